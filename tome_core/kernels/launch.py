"""What every Triton kernel here needs: Triton and its compiler, and products that its interpreter can do."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether the package is there; it comes with torch on Linux with CUDA."""

HAS_COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
"""Whether there is a C compiler where Triton looks for one: at the first launch it compiles what launches kernels."""


def widen_products(x: torch.Tensor) -> bool:
    """Whether operands must be float32 before a product: Triton's interpreter cannot multiply bfloat16."""
    from triton import knobs

    return bool(knobs.runtime.interpret) and x.dtype == torch.bfloat16
