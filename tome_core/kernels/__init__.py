"""The fused operations: Triton on a GPU, plain PyTorch elsewhere.

`operators` holds them, `reference` says what each means and is what the kernels are held against, `requirements` what
their operands must be.
"""

from __future__ import annotations

from tome_core.kernels.groups import Groups
from tome_core.kernels.launch import missing_on
from tome_core.kernels.norms import Norm
from tome_core.kernels.operators import (
    add_norm,
    attend,
    attend_match,
    cut,
    match,
    merge_add_norm,
    merge_sums,
    metric,
    norm,
    rotate,
)
from tome_core.kernels.products import accumulate, linear_gelu
from tome_core.kernels.relative import Bias
from tome_core.kernels.requirements import DTYPES, LARGEST_HEAD, SMALLEST_HEAD, fits_head

__all__ = [
    "DTYPES",
    "LARGEST_HEAD",
    "SMALLEST_HEAD",
    "Bias",
    "Groups",
    "Norm",
    "accumulate",
    "add_norm",
    "attend",
    "attend_match",
    "cut",
    "fits_head",
    "linear_gelu",
    "match",
    "merge_add_norm",
    "merge_sums",
    "metric",
    "missing_on",
    "norm",
    "rotate",
]
