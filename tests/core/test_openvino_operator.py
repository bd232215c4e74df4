"""The compiled operator against the library's own matching and merging."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tome_core.matching import match
from tome_core.merging import merge
from tome_core.schedule import max_r

openvino = pytest.importorskip("openvino", reason="the package openvino is not installed")

from tome_core import openvino_operator  # noqa: E402  # needs the package
from tome_core.openvino_core import add_operator, core  # noqa: E402
from tome_core.openvino_operator import OperatorError, build_operator, to_bfloat16  # noqa: E402

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def nothing_is_shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_operator, "_SHIPPED", tmp_path_factory.mktemp("shipped"))
        yield


NAME = "get_cpu_capability"
HERE = torch.backends.cpu.get_cpu_capability()
CPUS = ("any", "AVX2", "AVX512")
"""CPUs that the operator is compiled for; one runs what is compiled for those before it."""


@pytest.fixture(scope="module", params=CPUS[: CPUS.index(HERE) + 1] if HERE in CPUS else ["any"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, NAME, lambda: request.param)
        return build_operator(tmp_path_factory.mktemp("operator"))


def merged_by(
    library: Path, x: Tensor, keys: Tensor, size: Tensor, r: int, num_prefix_tokens: int, precision: str = "f32"
) -> tuple[Tensor, Tensor]:
    """What the operator makes of tokens (B, N, C), keys (B, num_heads, N, D) and sizes (B, N)."""
    ops, factory = openvino.opset15, openvino.utils.node_factory.NodeFactory()
    factory.add_extension(str(library))
    inputs = [tensor.numpy() for tensor in (x, keys.transpose(1, 2).flatten(2), size)]
    parameters = [ops.parameter(list(each.shape), np.float32) for each in inputs]
    facts: dict[str, Any] = {"r": r, "num_prefix_tokens": num_prefix_tokens, "num_heads": keys.shape[1]}
    made = factory.create("MergeTokens", [parameter.output(0) for parameter in parameters], facts)
    model = openvino.Model([made.output(0), made.output(1)], parameters)
    if precision == "bf16":
        to_bfloat16(model)
    add_operator(library)
    answers = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})(inputs)
    return torch.from_numpy(answers[0]), torch.from_numpy(answers[1])


@needs_compiler
@settings(max_examples=40)
@given(data=st.data())
def test_it_merges_as_the_library_does(data: st.DataObject, library: Path) -> None:
    num_prefix_tokens = data.draw(st.integers(0, 3), "num_prefix_tokens")
    N = data.draw(st.integers(num_prefix_tokens + 3, 80), "N")
    r = data.draw(st.integers(1, max_r(N, num_prefix_tokens)), "r")
    has_equals = data.draw(st.booleans(), "equal tokens")
    # In few dimensions cosines of different keys are equal but for the rounding, and every device has its own.
    least = 1 if has_equals else 8
    D = data.draw(st.integers(least, 37), "D")
    B, C, num_heads = (data.draw(st.integers(1, most), name) for most, name in ((3, "B"), (40, "C"), (3, "H")))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "seed"))
    x = torch.randn(B, N, C, generator=generator)
    keys = torch.randn(B, num_heads, N, D, generator=generator)
    if has_equals:  # whole numbers, so that every device rounds alike
        keys = torch.zeros(B, num_heads, N, D)
        keys[..., 0] = torch.randint(0, 2, (B, 1, N), generator=generator).float()
    size = torch.randint(1, 9, (B, N), generator=generator).float()
    wanted = merge(match(keys.mean(dim=1), r, num_prefix_tokens), x, size)
    for ours, theirs in zip(merged_by(library, x, keys, size, r, num_prefix_tokens), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_in_bfloat16_it_matches_and_weighs_in_float32(library: Path) -> None:
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    generator = torch.Generator().manual_seed(0)
    x, keys = (torch.randn(shape, generator=generator).bfloat16().float() for shape in ((2, 60, 24), (2, 3, 60, 16)))
    size = torch.randint(1, 900, (2, 60), generator=generator).float()  # more than bfloat16 can tell apart
    wanted = merge(match(keys.mean(dim=1), 20, 1), x, size)
    ours = merged_by(library, x, keys, size, 20, 1, "bf16")
    torch.testing.assert_close(ours[0], wanted[0].bfloat16().float(), atol=0, rtol=2**-7)
    assert torch.equal(ours[1], wanted[1])


@needs_compiler
def test_what_is_not_a_number_leaves_every_index_in_range(library: Path) -> None:
    x, keys, size = torch.ones(1, 9, 4), torch.full((1, 2, 9, 5), torch.nan), torch.ones(1, 9)
    merged, sizes = merged_by(library, x, keys, size, 3, 1)
    torch.testing.assert_close(merged, torch.ones(1, 6, 4))
    assert sizes.sum() == 9


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path) -> None:
    first = build_operator(tmp_path)
    made = first.stat()
    assert build_operator(tmp_path) == first
    assert list(tmp_path.iterdir()) == [first]
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_it_shares_no_memory_with_one_for_another_cpu(library: Path) -> None:
    """A thread's memory was aligned for the narrower vectors of the other library, and the process ended."""
    symbols = subprocess.run(["nm", "--demangle", str(library)], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line[17:18] in "uVW" and "propose" in line]
    assert "propose" in symbols and not shared


@needs_compiler
def test_one_that_is_shipped_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_operator, "_SHIPPED", tmp_path / "compiled")
    openvino_operator.ship()
    monkeypatch.setenv("PATH", str(tmp_path))
    found = set()
    for cpu in (HERE, "AVX2", "AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, NAME, lambda cpu=cpu: cpu)
        found.add(build_operator(tmp_path / "nothing is written here"))
    assert found == set((tmp_path / "compiled").iterdir())


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OperatorError, match="no C\\+\\+ compiler"):
        build_operator(tmp_path)
    command = [sys.executable, "-m", "tome_core.openvino_operator"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "the merging operator cannot be compiled: there is no C++ compiler (c++)\n",
    )


@needs_compiler
def test_what_the_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("this is no C++")
    monkeypatch.setattr(openvino_operator, "_SOURCE", wrong)
    with pytest.raises(OperatorError, match="error"):
        build_operator(tmp_path)
