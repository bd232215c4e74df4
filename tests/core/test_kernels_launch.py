"""How kernels are launched: what is compiled once and kept, what is left to Triton, and where there are none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tome_core.kernels import Norm, launch, operators
from tome_core.kernels.launch import Kernel

CPU = torch.device("cpu")


class FakeTriton:
    """Stands in for a jitted function: gives what it compiled, and tells who launched what.

    Attributes:
        compiled: How often it compiled.
        launches: Who launched ("Triton" or "kept"), the grid and the arguments.
    """

    def __init__(self) -> None:
        self.compiled = 0
        self.launches: list[tuple[str, Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, num_warps: int, num_stages: int) -> Any:
            self.compiled += 1
            self.launches.append(("Triton", grid, args))
            return FakeCompiled(self)

        return run


class FakeCompiled:
    def __init__(self, triton: FakeTriton) -> None:
        self._triton = triton

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args: self._triton.launches.append(("kept", grid, args))


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


def unaligned(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """A contiguous tensor that begins between two addresses that are multiples of 16."""
    x = torch.randn(torch.Size(shape).numel() + 1).to(device, dtype)[1:].view(shape)
    assert x.is_contiguous() and x.data_ptr() % 16
    return x


def test_what_was_compiled_is_kept_for_operands_of_the_same_kind(triton: FakeTriton) -> None:
    kernel, x, y = Kernel(triton), torch.zeros(8), torch.zeros(100)
    for tensor, number in ((x, 3), (y, 4), (x, 5)):
        kernel((number, 1, 1), (tensor, None), (number, 0.5), (64, True), num_warps=4)
    assert triton.compiled == 1
    assert [(who, grid[0], args[2]) for who, grid, args in triton.launches] == [
        ("Triton", 3, 3),
        ("kept", 4, 4),
        ("kept", 5, 5),
    ]
    assert triton.launches[1][2][0] is y


@pytest.mark.parametrize(
    ("tensors", "constants", "num_warps"),
    [
        ((torch.zeros(8).half(), None), (64,), 4),
        ((torch.zeros(8), torch.zeros(8)), (64,), 4),
        ((torch.zeros(8), None), (32,), 4),
        ((torch.zeros(8), None), (64,), 8),
        ((torch.zeros(8, device="meta"), None), (64,), 4),
    ],
    ids=["dtype", "an operand more", "constant", "warps", "device"],
)
def test_another_kind_is_compiled_anew(
    triton: FakeTriton, tensors: tuple[Any, ...], constants: tuple[int, ...], num_warps: int
) -> None:
    kernel = Kernel(triton)
    kernel((1, 1, 1), (torch.zeros(8), None), (), (64,), num_warps=4)
    kernel((1, 1, 1), tensors, (), constants, num_warps=num_warps)
    assert triton.compiled == 2


def test_operands_at_odd_addresses_are_left_to_triton(triton: FakeTriton) -> None:
    """What was compiled for aligned operands reads 16 bytes at a time."""
    kernel = Kernel(triton)
    for x in (unaligned(8), torch.zeros(8), unaligned(8), torch.zeros(8)):
        kernel((1, 1, 1), (torch.zeros(4), x), (), (), num_warps=4)
    assert [who for who, _, _ in triton.launches] == ["Triton", "Triton", "Triton", "kept"]


@pytest.mark.gpu
def test_operands_at_odd_addresses_give_the_same() -> None:
    cuda = torch.device("cuda")
    x, weight = unaligned(2, 50, 192, dtype=torch.bfloat16, device=cuda), torch.ones(192, device=cuda)
    log_size = unaligned(2, 50, device=cuda)
    y = x.clone()
    for _ in range(2):
        got = operators.norm(x, None, Norm(weight, None, 1e-6))
        torch.testing.assert_close(got, operators.norm(y, None, Norm(weight, None, 1e-6)))
        got = operators.attend(x, x, x, log_size, None, 3)
        torch.testing.assert_close(got, operators.attend(y, y, y, log_size.clone(), None, 3))


def test_a_machine_without_a_gpu_has_no_kernels() -> None:
    assert launch.missing_on(CPU) == "there are no kernels for cpu"


def test_a_gpu_without_triton_or_a_compiler_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HAS_TRITON", True)
    monkeypatch.setattr(launch, "HAS_COMPILER", False)
    assert "C compiler" in str(launch.missing_on(torch.device("cuda")))
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    assert "triton is not installed" in str(launch.missing_on(torch.device("cuda")))


@pytest.mark.parametrize(("capability", "missing"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_an_old_gpu_has_no_kernels(capability: tuple[int, int], missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HAS_TRITON", True)
    monkeypatch.setattr(launch, "HAS_COMPILER", True)
    monkeypatch.setattr(launch, "_capability", lambda device: capability)
    reason = launch.missing_on(torch.device("cuda"))
    assert (reason is not None) == missing and (reason is None or "7.5" in reason)
