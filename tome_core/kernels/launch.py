"""Availability of kernels, and their launch."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the package is installed; torch on Linux with CUDA brings it."""

HAS_COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
"""Whether there is a C compiler where Triton looks for one. At the first launch it compiles the launcher of kernels."""


def missing_on(device: torch.device) -> str | None:
    """The reason why there are no Triton kernels for a device; None if there are."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA's GPUs"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if not HAS_COMPILER:
        return "Triton needs a C compiler: install gcc or clang, or set CC"
    capability = _capability(device)
    return None if capability >= (8, 0) else f"the GPU has compute capability {capability[0]}.{capability[1]}, not 8.0"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class Kernel:
    """A Triton kernel, compiled once for each kind of operands.

    Triton inspects every argument at every launch, which takes longer than the GPU work of a small model. Only dtypes,
    alignment and constants are inspected here, so all numbers of the kernel must be `do_not_specialize`. Its parameters
    are tensors, then numbers, then constants.

    Args:
        function: The function, decorated by `triton.jit`.

    Attributes:
        compiled: The compiled kernels, by kind.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self.compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Any],
        numbers: Sequence[int | float],
        constants: Sequence[object],
        num_warps: int,
        num_stages: int = 3,
    ) -> None:
        """Launches the kernel.

        Args:
            grid: Programs along three axes.
            tensors: Operands on one device: tensors, descriptors of tensors, or None (not the first).
            numbers: Integers and floats.
            constants: Compiled into the kernel.
            num_warps: Warps of a program.
            num_stages: Steps that loops load ahead.
        """
        held = [getattr(t, "base", t) for t in tensors]  # a descriptor's tensor; its block is among the constants
        aligned = not any([t is not None and t.data_ptr() % 16 for t in held])
        key = (held[0].device, *[None if t is None else t.dtype for t in held], *constants, num_warps, num_stages)
        compiled = self.compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
        compiled = self._function[grid](*tensors, *numbers, *constants, num_warps=num_warps, num_stages=num_stages)
        if compiled is not None and aligned:  # the interpreter compiles nothing; Triton handles odd addresses
            self.compiled[key] = compiled


def widen_products(x: Tensor) -> bool:
    """Whether operands must be float32 before a product: Triton's interpreter cannot multiply bfloat16."""
    return interpreted() and x.dtype == torch.bfloat16


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, without a GPU's instructions and its compiler."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def power_of_2(n: int) -> int:
    """The smallest power of two that is n or more. Triton's own function is slow, as is its `cdiv`."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
