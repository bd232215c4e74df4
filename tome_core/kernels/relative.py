"""A bias between positions in the form that attention reads: a table of displacements, and codes that index it.

A bias of all pairs, (num_heads, N0, N0), depends only on the displacement between two cells of the grid, or on which of
the two is a prefix token. So a short list is enough: a pair's entry is at the sum of its row's code and its column's
code. A merged token also has a cell: it needs new codes, never a new table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tome_core.kept import kept
from tome_core.positions import nearest_cell

LOG2_E = 1.4426950408889634


class Bias(NamedTuple):
    """A bias of attention scores: that of row i and column j is `table[:, row_code[i] + column_code[j]]`.

    Attributes:
        table: Bias for each head and sum of two codes, (num_heads, T) float32, times log2 e.
        row_code: Code of each token as a query, (B, N) int32.
        column_code: Code of each token as a key, (B, N) int32.
    """

    table: Tensor
    row_code: Tensor
    column_code: Tensor


class _Codes(NamedTuple):
    """Layout of the codes for a grid with P prefix tokens: patches first, then each kind of pair in its own range."""

    width: int
    largest: int
    prefix_row: Tensor
    prefix_column: Tensor
    num_codes: int


def table_of(bias: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """The table of a bias between all pairs of the original tokens: (1, num_heads, N0, N0) -> (num_heads, T)."""
    rows, columns = _pairs(grid, num_prefix_tokens, bias.device)
    return bias[0][:, rows, columns].float() * LOG2_E


def cells_of(grid: tuple[int, int], num_prefix_tokens: int, device: torch.device) -> Tensor:
    """Row and column of each original token, (1, N0, 2) float32; zeros for prefix tokens, which have no cell."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device).float() for n in grid), indexing="ij")
    cells = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    return torch.cat([cells.new_zeros(num_prefix_tokens, 2), cells])[None]


def bias_of(table: Tensor, sums: Tensor, size: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Bias:
    """The bias between tokens, each at the cell nearest to the mean of its members' cells.

    Args:
        table: The result of `table_of`.
        sums: Sums of the rows and columns of each token's members, (B, N, 2) float32.
        size: Number of each token's members, (B, N) float32.
        grid: Rows and columns of patches.
        num_prefix_tokens: Leading tokens that never merge.
    """
    codes = _codes(grid, num_prefix_tokens, sums.device)
    cells = nearest_cell(sums, size)
    row = (cells[..., 0] * codes.width + cells[..., 1]).int()
    column = codes.largest - row
    if num_prefix_tokens:
        row[:, :num_prefix_tokens], column[:, :num_prefix_tokens] = codes.prefix_row, codes.prefix_column
    return Bias(table, row, column)


@kept
def _codes(grid: tuple[int, int], P: int, device: torch.device) -> _Codes:
    """Sums of two codes: patch and patch from 0 on, then prefix and patch, patch and prefix, prefix and prefix."""
    width = 2 * grid[1] - 1
    largest = (grid[0] - 1) * width + grid[1] - 1
    step = largest + 1
    prefix = torch.arange(P, dtype=torch.int32, device=device)
    first_row = 2 * step + P * P * step
    first_column = first_row + P * step
    num_codes = first_row + first_column + P * P * step
    return _Codes(width, largest, first_row + prefix * step, first_column + prefix * P * step, num_codes)


@kept
def _pairs(grid: tuple[int, int], num_prefix_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each sum of two codes a row and a column that have it; 0 and 0 if there are none."""
    sums = cells_of(grid, num_prefix_tokens, torch.device("cpu"))
    unused = torch.zeros(1, 1, device="cpu")
    bias = bias_of(unused, sums, torch.ones_like(sums[..., 0]), grid, num_prefix_tokens)
    at = (bias.row_code[0][:, None] + bias.column_code[0]).flatten().long()
    num_codes = _codes(grid, num_prefix_tokens, torch.device("cpu")).num_codes
    pairs = torch.zeros(2, num_codes, dtype=torch.long, device="cpu")
    tokens = torch.arange(sums.shape[1], device="cpu")
    pairs[0, at] = tokens.repeat_interleave(len(tokens))
    pairs[1, at] = tokens.repeat(len(tokens))
    rows, columns = pairs.to(device)
    return rows, columns
