"""The fused operations: Triton on a GPU, plain PyTorch elsewhere.

`operators` holds them, `reference` says what each means and is what the kernels are held against, `requirements` what
their operands must be: it stands in front of the choice of implementation, so that a CPU refuses what a GPU would.
Token counts, `r` and the like are numbers that no kernel is compiled for; only widths, strides and block sizes are.
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
