"""The fused operations: Triton on a GPU, plain PyTorch elsewhere.

`operators` has them. `reference` defines each in plain PyTorch, and the kernels are compared with it. `requirements`
checks the operands before the implementation is chosen, so that a CPU refuses what a GPU would. Kernels are compiled
for widths, strides and block sizes only, not for numbers such as token counts and `r`.
"""

from __future__ import annotations

from tome_core.kernels.groups import Groups
from tome_core.kernels.launch import missing_on
from tome_core.kernels.norms import Norm
from tome_core.kernels.operators import (
    accumulate8,
    add_norm,
    attend,
    attend_match,
    cut,
    linear_gelu8,
    match,
    merge_add_norm,
    merge_sums,
    metric,
    norm,
    rotate,
)
from tome_core.kernels.products import accumulate, linear8, linear_gelu
from tome_core.kernels.relative import Bias
from tome_core.kernels.requirements import DTYPES, FLOAT8, LARGEST_HEAD, SMALLEST_HEAD, fits_head

__all__ = [
    "DTYPES",
    "FLOAT8",
    "LARGEST_HEAD",
    "SMALLEST_HEAD",
    "Bias",
    "Groups",
    "Norm",
    "accumulate",
    "accumulate8",
    "add_norm",
    "attend",
    "attend_match",
    "cut",
    "fits_head",
    "linear8",
    "linear_gelu",
    "linear_gelu8",
    "match",
    "merge_add_norm",
    "merge_sums",
    "metric",
    "missing_on",
    "norm",
    "rotate",
]
