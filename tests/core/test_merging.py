"""Merging as arithmetic: sizes add up, values are size-weighted means, and every token can be found again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tome_core.matching import MergePlan, match
from tome_core.merging import merge, track_source, unmerge

seeds = st.integers(0, 2**32)


@st.composite
def plans(draw: st.DrawFn) -> tuple[MergePlan, torch.Generator]:
    """A random plan, and the generator that made it, to go on with."""
    generator = torch.Generator().manual_seed(draw(seeds))
    B, N, prefix = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(0, 3))
    metric = torch.randn(B, N, 4, generator=generator)
    return match(metric, draw(st.integers(0, N)), prefix), generator


def shape(plan: MergePlan) -> tuple[int, int]:
    return plan.keep.shape[0], plan.keep.shape[1] + plan.src.shape[1]


def random_size(plan: MergePlan, generator: torch.Generator) -> Tensor:
    return torch.randint(1, 100, shape(plan), generator=generator).float()


def assignment(plan: MergePlan) -> Tensor:
    """Which row holds which token, (B, M, N) float64, built by hand from the plan."""
    B, N = shape(plan)
    held = torch.zeros(B, plan.keep.shape[1], N, dtype=torch.float64)
    for b in range(B):
        for row, token in enumerate(plan.keep[b].tolist()):
            held[b, row, token] = 1
        for token, row in zip(plan.src[b].tolist(), plan.dst[b].tolist(), strict=True):
            held[b, row, token] = 1
    return held


@given(plans())
def test_sizes_are_the_sums_of_what_merged_exactly(case: tuple[MergePlan, torch.Generator]) -> None:
    plan, generator = case
    size = random_size(plan, generator)
    _, merged_size = merge(plan, torch.zeros(*shape(plan), 1), size)
    assert torch.equal(merged_size.double(), (assignment(plan) @ size.double()[..., None])[..., 0])
    assert torch.equal(merged_size.sum(1), size.sum(1))


@given(plans())
def test_a_merged_token_is_the_size_weighted_mean(case: tuple[MergePlan, torch.Generator]) -> None:
    plan, generator = case
    x, size = torch.randn(*shape(plan), 5, generator=generator), random_size(plan, generator)
    weights = assignment(plan) * size.double()[:, None, :]
    expected = weights @ x.double() / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(merge(plan, x, size)[0].double(), expected, rtol=1e-5, atol=1e-6)


@given(plans())
def test_without_sizes_every_token_counts_once(case: tuple[MergePlan, torch.Generator]) -> None:
    plan, generator = case
    x = torch.randn(*shape(plan), 5, generator=generator)
    for without, with_ones in zip(merge(plan, x), merge(plan, x, torch.ones(shape(plan))), strict=True):
        assert torch.equal(without, with_ones)


@given(plans())
def test_equal_tokens_stay_what_they_are(case: tuple[MergePlan, torch.Generator]) -> None:
    plan, generator = case
    token = torch.randn(5, generator=generator)
    merged, _ = merge(plan, token.expand(*shape(plan), 5), random_size(plan, generator))
    torch.testing.assert_close(merged, token.expand_as(merged))


@given(plans())
def test_autocast_changes_no_bit(case: tuple[MergePlan, torch.Generator]) -> None:
    plan, generator = case
    x, size = torch.randn(*shape(plan), 5, generator=generator), random_size(plan, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = merge(plan, x, size)
    for a, b in zip(lowered, merge(plan, x, size), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_values_with_large_sizes_do_not_overflow_half_precision(dtype: torch.dtype) -> None:
    plan = MergePlan(torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.tensor([[0]]))
    x, size = torch.tensor([[[400.0], [200.0], [1.0]]], dtype=dtype), torch.tensor([[200.0, 600.0, 1.0]])
    merged, merged_size = merge(plan, x, size)
    assert merged.dtype == dtype
    assert merged.tolist() == [[[250.0], [1.0]]]
    assert merged_size.tolist() == [[800.0, 1.0]]


def test_sizes_stay_exact_where_half_precision_stops_counting() -> None:
    plan = MergePlan(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0]]))
    _, size = merge(plan, torch.zeros(1, 2, 1, dtype=torch.bfloat16), torch.tensor([[256.0, 1.0]]))
    assert size.tolist() == [[257.0]]


@given(seeds, st.integers(2, 40), st.integers(0, 2), st.lists(st.integers(0, 12), min_size=1, max_size=5))
def test_source_follows_every_token_through_several_merges(seed: int, N: int, prefix: int, rs: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = [[[token] for token in range(N)] for _ in range(2)]  # what each row holds, by brute force
    source: Tensor | None = None
    size = torch.ones(2, N)
    for r in rs:
        plan = match(torch.randn(2, len(groups[0]), 4, generator=generator), r, prefix)
        _, size = merge(plan, size[..., None], size)
        source = track_source(plan, source)
        for b, rows in enumerate(groups):
            groups[b] = [list(rows[token]) for token in plan.keep[b].tolist()]
            for token, row in zip(plan.src[b].tolist(), plan.dst[b].tolist(), strict=True):
                groups[b][row] += rows[token]
    assert source is not None
    for b, rows in enumerate(groups):
        assert size[b].tolist() == [len(tokens) for tokens in rows]
        assert source[b].tolist() == [next(row for row, held in enumerate(rows) if token in held) for token in range(N)]


@given(plans())
def test_unmerge_gives_every_token_the_value_of_its_holder(case: tuple[MergePlan, torch.Generator]) -> None:
    plan, generator = case
    rows = torch.randn(*plan.keep.shape, 5, generator=generator)
    expected = assignment(plan).transpose(1, 2) @ rows.double()
    assert torch.equal(unmerge(rows, track_source(plan)).double(), expected)


@given(plans())
def test_the_gradient_reaches_each_token_by_its_share_of_the_size(case: tuple[MergePlan, torch.Generator]) -> None:
    plan, generator = case
    x = torch.randn(*shape(plan), 5, generator=generator, requires_grad=True)
    size = random_size(plan, generator)
    merged, merged_size = merge(plan, x, size)
    arriving = torch.randn(merged.shape, generator=generator)
    (gradient,) = torch.autograd.grad(merged, x, arriving)
    source = track_source(plan)
    share = size / merged_size.gather(1, source)
    torch.testing.assert_close(gradient, unmerge(arriving, source) * share[..., None])
