"""Seeing what merged: groups after each block against the books of the forward loop, and every pixel of a painting."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tome_core import MergedViT, Ramp, wrap
from tome_core.schedule import RLike
from tome_core.visualize import paint, sources

seeds = st.integers(0, 2**32)


@pytest.fixture
def merged(build: Callable[..., VisionTransformer]) -> MergedViT:
    return wrap(build())


@pytest.mark.parametrize("r", [0, 5, [0, 7], [3, 0, 1000], Ramp(6)])
def test_after_each_block_there_are_as_many_groups_as_tokens(merged: MergedViT, r: RLike) -> None:
    found = sources(merged, torch.randn(2, 3, 96, 96), r, (0, 1, 2))
    for source, tokens in zip(found, merged.token_counts(r)[1:], strict=True):
        assert source.shape == (2, merged.num_tokens) and source.dtype == torch.int64
        assert [len(row.unique()) for row in source] == [tokens, tokens]


def test_the_last_block_shows_what_the_forward_loop_tracks(merged: MergedViT) -> None:
    images = torch.randn(2, 3, 96, 96)
    tracked = merged.forward_tokens(images, (9, 4, 6), track=True).source
    assert tracked is not None
    assert torch.equal(sources(merged, images, (9, 4, 6), [2])[0], tracked)


def test_tokens_that_have_met_stay_together(merged: MergedViT) -> None:
    early, late = (source[0] for source in sources(merged, torch.randn(1, 3, 96, 96), 8, (0, 2)))
    together = early[:, None] == early
    assert together.sum() > len(early)
    assert (late[:, None] == late)[together].all()


def test_a_block_can_be_looked_behind_in_any_order_and_before_anything_merges(merged: MergedViT) -> None:
    images = torch.randn(1, 3, 96, 96)
    third, first = sources(merged, images, (0, 0, 4), (2, 0))
    assert torch.equal(first, torch.arange(merged.num_tokens)[None])
    assert len(third.unique()) == merged.num_tokens - 4


@pytest.mark.parametrize("block", [-4, 3])
def test_a_block_that_the_model_has_not_is_refused(merged: MergedViT, block: int) -> None:
    with pytest.raises(ValueError, match=f"names block {block}; blocks lie between -3 and 2"):
        sources(merged, torch.randn(1, 3, 96, 96), 4, [0, block])


class Case(NamedTuple):
    """A picture and groups of its patches, with a gap in the rows that hold them as merging may leave."""

    image: Tensor
    source: Tensor
    grid: tuple[int, int]
    prefix: int

    @property
    def cell(self) -> tuple[int, int]:
        return self.image.shape[1] // self.grid[0], self.image.shape[2] // self.grid[1]

    def groups(self) -> Tensor:
        """The group of each pixel, (H, W), as a Kronecker product."""
        return torch.kron(self.source[self.prefix :].view(self.grid), torch.ones(self.cell, dtype=torch.int64))

    def lone(self) -> Tensor:
        """Whether a pixel's group is of one patch, (H, W)."""
        patches = self.source[self.prefix :]
        return (patches[:, None] == patches).sum(1).eq(1).view(self.grid).kron(torch.ones(self.cell, dtype=torch.bool))

    def painted(self, border: int) -> Tensor:
        return paint(self.image, self.source, self.grid, self.prefix, border)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    grid = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    cell = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    prefix, N = draw(st.integers(0, 3)), grid[0] * grid[1]
    generator = torch.Generator().manual_seed(draw(seeds))
    image = torch.randint(256, (3, grid[0] * cell[0], grid[1] * cell[1]), generator=generator, dtype=torch.uint8)
    rows = torch.randint(prefix, prefix + draw(st.integers(1, N)), (N,), generator=generator)
    return Case(image, torch.cat([torch.arange(prefix), rows]), grid, prefix)


@given(cases())
def test_a_merged_group_has_its_mean_colour_and_a_lone_patch_its_own_pixels(case: Case) -> None:
    painted, groups, lone = case.painted(0), case.groups(), case.lone()
    assert painted.shape == case.image.shape and painted.dtype == torch.uint8
    for group in groups.unique():
        pixels = groups == group
        if lone[pixels].all():
            assert torch.equal(painted[:, pixels], case.image[:, pixels])
        else:
            mean = case.image[:, pixels].double().mean(dim=1, keepdim=True)
            assert (painted[:, pixels].double() - mean).abs().max() <= 0.5 + 1e-9
            assert (painted[:, pixels] == painted[:, pixels][:, :1]).all()


@given(cases(), st.integers(1, 4))
def test_lines_run_in_merged_groups_where_another_is_near_and_nowhere_else(case: Case, border: int) -> None:
    image = case.image.clamp(max=50)  # darker than any line
    plain, painted = (paint(image, case.source, case.grid, case.prefix, width) for width in (0, border))
    groups, lone = case.groups(), case.lone()
    H, W = groups.shape
    for y in range(H):
        for x in range(W):
            near = groups[max(y - border, 0) : y + border + 1, max(x - border, 0) : x + border + 1]
            line = bool((near != groups[y, x]).any()) and not lone[y, x]
            assert line == bool((painted[:, y, x] != plain[:, y, x]).any())


@given(cases(), seeds)
def test_the_painting_depends_on_who_is_together_and_not_on_their_row(case: Case, seed: int) -> None:
    rows = torch.randperm(int(case.source.max()) + 1, generator=torch.Generator().manual_seed(seed))
    shuffled = torch.cat([case.source[: case.prefix], rows[case.source[case.prefix :]]])
    assert torch.equal(case.painted(1), paint(case.image, shuffled, case.grid, case.prefix, 1))


def test_a_group_keeps_the_colour_of_its_line_while_it_swallows_later_ones() -> None:
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    early = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 4]])
    late = torch.where(early >= 3, 1, early)
    before, after = (paint(image, source.flatten(), (2, 8), 0) for source in (early, late))
    lines = [(before[:, y, x].tolist(), after[:, y, x].tolist()) for y, x in ((16, 15), (0, 16))]  # of groups 0 and 1
    assert all(one == other and any(one) for one, other in lines)
    assert lines[0] != lines[1]
    assert after[:, 0, 48].tolist() == after[:, 0, 16].tolist() != before[:, 0, 48].tolist()


def test_neighbouring_groups_have_lines_of_different_colours() -> None:
    rows, columns, cell = 14, 14, 4
    groups = torch.arange(rows // 2 * columns // 2).view(rows // 2, columns // 2)
    source = groups.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    painted = paint(torch.zeros(3, rows * cell, columns * cell, dtype=torch.uint8), source, (rows, columns), 0).int()
    right = painted[:, cell :: 2 * cell, 2 * cell - 1 :: 2 * cell]  # a pixel of each group's right line, 7 x 7
    below = painted[:, 2 * cell - 1 :: 2 * cell, cell :: 2 * cell]  # and of its lower line
    assert (right[:, :, :-2] - right[:, :, 1:-1]).abs().amax(0).min() > 60  # the last has none: the rim is no edge
    assert (below[:, :-2] - below[:, 1:-1]).abs().amax(0).min() > 60


def test_nothing_merged_is_the_image_itself() -> None:
    image = torch.randint(256, (3, 24, 36), dtype=torch.uint8)
    assert torch.equal(paint(image, torch.arange(8), (2, 3), 2, 3), image)


def test_means_stay_exact_where_float32_stops_counting() -> None:
    image = torch.full((3, 512, 512), 253, dtype=torch.uint8)
    image[:, ::2] = 254
    image[:, 0, 0] = 253  # the mean is just under 253.5
    assert paint(image, torch.zeros(4, dtype=torch.int64), (2, 2), 0).unique().tolist() == [253]


@pytest.mark.parametrize(
    ("image", "tokens", "grid", "border", "message"),
    [
        (torch.zeros(3, 8, 8), 5, (2, 2), 1, r"image is \(3, 8, 8\) of torch.float32; it must be .* torch.uint8"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), 5, (2, 2), 1, r"image is \(8, 8, 3\).* it must be \(3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 5, (2, 2), 1, r"image is \(1, 3, 8, 8\)"),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), 5, (2, 2), 1, "8 x 9 pixels; .* multiple of the grid's 2 x 2"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), 5, (2, 2), 1, "0 x 8 pixels"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), 4, (2, 2), 1, r"\(4,\); it must be \(5,\), for 1 prefix .* 2 x 2"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), 5, (2, 2), -1, "border is -1; it must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(
    image: Tensor, tokens: int, grid: tuple[int, int], border: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paint(image, torch.arange(tokens), grid, 1, border)
