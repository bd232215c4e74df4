"""Sums that travel with tokens through fused blocks, against positions gathered from where every token came from."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tome_core import travelling
from tome_core.kernels import match, merge_sums
from tome_core.kernels.groups import plan_of
from tome_core.kernels.relative import LOG2_E, bias_of, cells_of, table_of
from tome_core.merging import track_source
from tome_core.positions import Position, follow, nearest_cell
from tome_core.schedule import max_r


class Merged(NamedTuple):
    """Tokens after some random merges.

    Attributes:
        grid: Rows and columns of patches.
        prefix: Prefix tokens before them.
        source: Row that now holds each original token, (B, N0).
        size: Members of each token, (B, N).
        places: What was kept of the original tokens, added up, (B, N, K).
    """

    grid: tuple[int, int]
    prefix: int
    source: Tensor
    size: Tensor
    places: Tensor


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, int], int, list[int], int]:
    """A grid, prefix tokens, what to merge (some of it too much), and a seed."""
    grid = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    rs = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    return grid, draw(st.integers(0, 3)), rs, draw(st.integers(0, 2**32))


def merged(case: tuple[tuple[int, int], int, list[int], int], position: Position) -> Merged:
    """Merges at random, and lets the places of `travelling.start` follow."""
    grid, prefix, rs, seed = case
    generator = torch.Generator().manual_seed(seed)
    N0 = prefix + grid[0] * grid[1]
    places = travelling.start(position, torch.zeros(2, N0, 4), prefix)
    assert places is not None
    source, size = None, torch.ones(1, N0, 1)
    for r in rs:
        N = size.shape[1]
        r = min(r, max_r(N, prefix))
        if r == 0:
            break
        groups = match(torch.randn(2, N, 8, generator=generator), r, prefix)
        source = track_source(plan_of(groups), source)
        places, size = merge_sums(groups, places), merge_sums(groups, size)
    if source is None:
        source = torch.arange(N0).expand(2, -1)
        places, size = places.expand(2, -1, -1).contiguous(), size.expand(2, -1, -1)
    return Merged(grid, prefix, source, size[..., 0].contiguous(), places)


@given(grids(), st.booleans())
def test_a_bias_is_that_between_the_cells_nearest(
    case: tuple[tuple[int, int], int, list[int], int], through_start: bool
) -> None:
    (rows, columns), prefix, _, seed = case
    torch.manual_seed(seed)
    N0, H = prefix + rows * columns, 3
    full = of_displacements((rows, columns), prefix, H)
    position = Position(bias=full, grid=(rows, columns))
    now = merged(case, position)
    bias = travelling.bias_at(position, now.places, now.size, prefix)
    assert bias is not None and bias.row_code.dtype == bias.column_code.dtype == torch.int32
    code = bias.row_code[:, :, None] + bias.column_code[:, None, :]
    assert code.min() >= 0 and code.max() < bias.table.shape[1]
    got = (bias.table / LOG2_E)[:, code].transpose(0, 1)
    wanted = follow(position, now.source, now.size.shape[1], prefix).bias
    assert wanted is not None
    torch.testing.assert_close(got, wanted)
    if through_start:  # before anything merges: the very bias
        first = travelling.bias_at(position, travelling.start(position, torch.zeros(2, N0, 4), prefix), None, prefix)
        assert first is not None
        code = first.row_code[:, :, None] + first.column_code[:, None, :]
        torch.testing.assert_close((first.table / LOG2_E)[:, code].transpose(0, 1), full.expand(2, -1, -1, -1))


def of_displacements(grid: tuple[int, int], prefix: int, num_heads: int) -> Tensor:
    """A bias (1, H, N0, N0) as timm's tables give it: by the displacement of patches, by pair where one is a prefix."""
    rows, columns = grid
    N0 = prefix + rows * columns
    bias = torch.randn(num_heads, N0, N0)
    of_prefix_row, of_prefix_column = torch.randn(num_heads, prefix, 1), torch.randn(num_heads, 1, prefix)
    bias[:, :prefix, prefix:], bias[:, prefix:, :prefix] = of_prefix_row, of_prefix_column
    table = torch.randn(num_heads, 2 * rows - 1, 2 * columns - 1)
    for i in range(rows * columns):
        for j in range(rows * columns):
            down, right = i // columns - j // columns, i % columns - j % columns
            bias[:, prefix + i, prefix + j] = table[:, down + rows - 1, right + columns - 1]
    return bias[None]


@given(grids(), st.booleans())
def test_a_rotary_table_is_the_mean_of_its_members(
    case: tuple[tuple[int, int], int, list[int], int], a_table_a_head: bool
) -> None:
    grid, prefix, _, seed = case
    torch.manual_seed(seed)
    H, D = 3, 4
    rope = torch.randn(*([H] if a_table_a_head else []), grid[0] * grid[1], 2 * D)
    position = Position(rope=rope)
    now = merged(case, position)
    table = travelling.table_at(rope, now.places, now.size, prefix) / now.size[..., None]
    assert table.is_contiguous()
    N = now.size.shape[1]
    by_head = table.unflatten(-1, (-1, 2 * D)).transpose(1, 2)  # (B, 1 or H, N, 2D)
    sines, cosines = by_head[:, :, :prefix].chunk(2, dim=-1)
    assert (sines == 0).all() and (cosines == 1).all()  # prefix tokens do not turn
    wanted = follow(position, now.source, N, prefix).rope
    assert wanted is not None
    torch.testing.assert_close(by_head[:, :, prefix:], wanted)


def test_before_the_first_merge_tables_are_as_they_were() -> None:
    x = torch.zeros(2, 7, 4)
    shared, of_heads = torch.randn(6, 8), torch.randn(3, 6, 8)
    for rope in (shared, of_heads):
        places = travelling.start(Position(rope=rope), x, 1)
        table = travelling.table_at(rope, places, None, 1)
        assert table.shape == (1, 7, 8 if rope is shared else 24) and table.is_contiguous()
        torch.testing.assert_close(table[0, 1:], rope if rope is shared else rope.transpose(0, 1).flatten(1))
    assert travelling.start(Position(), x, 1) is None
    assert travelling.bias_at(Position(), None, None, 1) is None


@pytest.mark.parametrize(
    ("cells", "nearest"),
    [
        ([(0, 0), (0, 1)], (0, 1)),  # halfway: the later one
        ([(0, 0), (1, 1)], (1, 1)),
        ([(2, 3), (2, 3)], (2, 3)),
        ([(0, 0), (0, 0), (0, 1)], (0, 0)),
        ([(0, 0), (0, 1), (0, 1)], (0, 1)),
        ([(0, 0), (3, 0), (0, 1), (3, 1)], (2, 1)),
        ([(0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (1, 1)], (1, 1)),
        ([(0, 6)] * 7 + [(0, 7)] * 7, (0, 7)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_nearest_cell(cells: list[tuple[int, int]], nearest: tuple[int, int], dtype: torch.dtype) -> None:
    sums, size = torch.tensor([cells]).sum(dim=1, keepdim=True).to(dtype), torch.full((1, 1), len(cells), dtype=dtype)
    assert nearest_cell(sums, size).tolist() == [[list(nearest)]]
    grid = (10, 10)
    table = table_of(torch.zeros(1, 1, 100, 100), grid, 0)
    merged_code = bias_of(table, sums.float(), size.float(), grid, 0).row_code
    alone = bias_of(table, torch.tensor([[nearest]]).float(), torch.ones(1, 1), grid, 0).row_code
    assert torch.equal(merged_code, alone)


def test_prefix_tokens_stand_nowhere() -> None:
    cells = cells_of((2, 3), 2, torch.device("cpu"))
    assert cells.tolist() == [[[0, 0], [0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]]
