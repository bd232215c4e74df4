"""Positions after merges: rotary tables by the mean of their members' rows, biases by the cell nearest to the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from tome_core import wrap
from tome_core.positions import NOWHERE, Position, follow

Build = Callable[..., Any]


@st.composite
def merges(draw: st.DrawFn) -> tuple[Tensor, int, int, tuple[int, int]]:
    """A source (B, N0), the tokens left, the prefix tokens, and the grid of patches."""
    B, rows, columns, prefix = (draw(st.integers(low, high)) for low, high in ((1, 3), (1, 4), (1, 5), (0, 2)))
    patches = rows * columns
    left = draw(st.integers(1, patches))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    images = []
    for _ in range(B):
        groups = torch.cat([torch.arange(left), torch.randint(left, (patches - left,), generator=generator)])
        images.append(torch.cat([torch.arange(prefix), prefix + groups[torch.randperm(patches, generator=generator)]]))
    return torch.stack(images), prefix + left, prefix, (rows, columns)


@given(merges(), st.booleans())
def test_a_rotary_row_is_the_mean_of_its_members_rows(
    merge: tuple[Tensor, int, int, tuple[int, int]], a_table_a_head: bool
) -> None:
    source, num_tokens, prefix, grid = merge
    rope = torch.randn(*([3] if a_table_a_head else []), grid[0] * grid[1], 8)
    moved = follow(Position(rope=rope), source, num_tokens, prefix).rope
    assert moved is not None
    assert moved.shape == (len(source), 3 if a_table_a_head else 1, num_tokens - prefix, 8)
    for b in range(len(source)):
        for row in range(prefix, num_tokens):
            members = source[b, prefix:] == row
            expected = rope[..., members, :].mean(dim=-2)
            torch.testing.assert_close(moved[b, :, row - prefix], expected.expand(moved.shape[1], -1))


@given(merges())
def test_a_merged_key_rotates_to_the_mean_of_its_members_rotated_keys(
    merge: tuple[Tensor, int, int, tuple[int, int]],
) -> None:
    source, num_tokens, prefix, grid = merge
    angles = torch.randn(grid[0] * grid[1], 4).repeat_interleave(2, dim=-1)
    rope = torch.cat([angles.sin(), angles.cos()], dim=-1)
    key = torch.randn(8)
    moved = follow(Position(rope=rope), source, num_tokens, prefix).rope
    assert moved is not None
    for b in range(len(source)):
        for row in range(prefix, num_tokens):
            members = rope[source[b, prefix:] == row]
            expected = apply_rot_embed_cat(key.expand(len(members), -1), members).mean(dim=0)
            given_key = apply_rot_embed_cat(key, moved[b, 0, row - prefix])
            torch.testing.assert_close(given_key, expected, rtol=1e-5, atol=1e-5)


@given(merges())
def test_a_bias_is_that_between_the_cells_nearest_to_the_means(
    merge: tuple[Tensor, int, int, tuple[int, int]],
) -> None:
    source, num_tokens, prefix, (rows, columns) = merge
    num_inputs = prefix + rows * columns
    bias = torch.randn(1, 2, num_inputs, num_inputs)
    moved = follow(Position(bias=bias, grid=(rows, columns)), source, num_tokens, prefix).bias
    assert moved is not None
    assert moved.shape == (len(source), 2, num_tokens, num_tokens)
    for b in range(len(source)):
        stands_at = list(range(prefix))
        for row in range(prefix, num_tokens):
            members = [int(i) - prefix for i in (source[b] == row).nonzero()]
            row_mean = torch.tensor([m // columns for m in members]).float().mean()
            column_mean = torch.tensor([m % columns for m in members]).float().mean()
            stands_at.append(prefix + int(row_mean.round()) * columns + int(column_mean.round()))
        assert torch.equal(moved[b], bias[0][:, stands_at][:, :, stands_at])


def test_nowhere_stays_nowhere() -> None:
    assert follow(NOWHERE, torch.zeros(1, 4, dtype=torch.long), 2, 0) == NOWHERE


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_relpos_small_patch16_224", "beit_base_patch16_224"])
def test_positions_decide_what_the_model_says_after_a_merge(build: Build, name: str) -> None:
    """Moving an image's patches about changes the logits under merging as it does without."""
    merged = wrap(build(name))
    image = torch.randn(1, 3, 96, 96)
    moved = image.roll(16, dims=-1)
    for r in (0, 6):
        assert (merged(image, r) - merged(moved, r)).abs().max() > 1e-3
