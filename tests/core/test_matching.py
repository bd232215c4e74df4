"""Bipartite soft matching, against a plain float64 loop."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tome_core.matching import MergePlan, match

ROUNDING = 1e-5  # by how much a float32 cosine may differ from the true one


class Case(NamedTuple):
    metric: Tensor
    r: int
    prefix: int

    def plan(self) -> MergePlan:
        return match(self.metric, self.r, self.prefix)

    def image(self, b: int) -> tuple[list[int], list[int], list[int], Tensor]:
        """One image of the plan as lists (keep, src, and the token that each src joins), with its metric."""
        keep, src, dst = (rows[b].tolist() for rows in self.plan())
        return keep, src, [keep[row] for row in dst], self.metric[b]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prefix = draw(st.integers(0, 5))
    B, N, D = draw(st.integers(1, 3)), draw(st.integers(prefix, 24)), draw(st.integers(1, 8))
    metric = torch.randn(B, N, D, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    if draw(st.booleans()):
        metric[:, draw(st.integers(0, 3)) :: 3] = 0  # some tokens with no direction at all
    return Case(metric, draw(st.integers(0, N + 2)), prefix)


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms else 0.0


def assert_same(one: MergePlan, other: MergePlan) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@given(cases())
def test_keep_and_src_are_a_permutation_of_the_tokens(case: Case) -> None:
    plan = case.plan()
    everyone = torch.arange(case.metric.shape[1]).expand(case.metric.shape[:2])
    assert torch.equal(torch.cat([plan.keep, plan.src], dim=1).sort(dim=1).values, everyone)


@given(cases())
def test_r_pairs_merge_as_far_as_half_of_the_patches_allows(case: Case) -> None:
    B, N, _ = case.metric.shape
    r = min(case.r, (N - case.prefix) // 2)
    assert [tuple(rows.shape) for rows in case.plan()] == [(B, N - r), (B, r), (B, r)]


@given(cases())
def test_rows_are_prefix_then_unmerged_src_then_every_dst_each_in_order(case: Case) -> None:
    for b in range(len(case.metric)):
        keep, src, _, metric = case.image(b)
        prefix, patches = list(range(case.prefix)), range(case.prefix, len(metric))
        unmerged = [i for i in patches if i % 2 == 0 and i not in src]
        if src:
            assert keep == prefix + unmerged + [i for i in patches if i % 2 == 1]
        else:
            assert keep == list(range(len(metric)))


@given(cases())
def test_src_are_even_patches_and_join_odd_patches(case: Case) -> None:
    for b in range(len(case.metric)):
        _, src, joined, _ = case.image(b)
        assert all(i % 2 == 0 and i >= case.prefix for i in src)
        assert all(i % 2 == 1 and i >= case.prefix for i in joined)


@given(cases())
def test_each_src_joins_its_most_similar_dst(case: Case) -> None:
    for b in range(len(case.metric)):
        _, src, joined, metric = case.image(b)
        all_dst = [j for j in range(case.prefix, len(metric)) if j % 2 == 1]
        for i, j in zip(src, joined, strict=True):
            assert cosine(metric[i], metric[j]) >= max(cosine(metric[i], metric[k]) for k in all_dst) - ROUNDING


@given(cases())
def test_the_pairs_that_merge_are_the_most_similar_best_first(case: Case) -> None:
    for b in range(len(case.metric)):
        keep, src, _, metric = case.image(b)
        patches = range(case.prefix, len(metric))
        best = {i: max((cosine(metric[i], metric[j]) for j in patches if j % 2), default=0.0) for i in patches}
        order = src + [i for i in keep if i >= case.prefix and i % 2 == 0]
        if src:
            for better, worse in product(range(len(src)), range(len(order))):
                assert better >= worse or best[order[better]] >= best[order[worse]] - ROUNDING


@given(cases())
def test_target_sends_every_token_to_its_row(case: Case) -> None:
    plan = case.plan()
    assert torch.equal(plan.target().gather(1, plan.keep), torch.arange(plan.keep.shape[1]).expand_as(plan.keep))
    assert torch.equal(plan.target().gather(1, plan.src), plan.dst)


@given(cases())
def test_r_0_leaves_every_token_where_it_is(case: Case) -> None:
    plan = match(case.metric, 0, case.prefix)
    assert torch.equal(plan.target(), torch.arange(case.metric.shape[1]).expand(case.metric.shape[:2]))


@given(cases(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_compared_in_float32(case: Case, dtype: torch.dtype) -> None:
    half = case.metric.to(dtype)
    assert_same(match(half, case.r, case.prefix), match(half.float(), case.r, case.prefix))


@given(cases())
def test_autocast_does_not_lower_the_comparison(case: Case) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = case.plan()
    assert_same(lowered, case.plan())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_go_to_the_earlier_token(value: float) -> None:
    metric = torch.zeros(2, 11, 4)
    metric[..., 0] = value
    plan = match(metric, 3, num_prefix_tokens=1)
    assert plan.src.tolist() == [[2, 4, 6]] * 2
    assert plan.keep.tolist() == [[0, 8, 10, 1, 3, 5, 7, 9]] * 2
    assert plan.dst.tolist() == [[3, 3, 3]] * 2  # the row of token 1


def test_a_token_without_direction_is_closer_than_an_opposite_one() -> None:
    metric = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]])
    assert match(metric, 1).src.tolist() == [[2]]


def test_length_does_not_count() -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.01, 0.0], [1.0, 0.1], [9.0, 9.0]]])
    plan = match(metric, 2)
    assert plan.keep.gather(1, plan.dst).tolist() == [[1, 1]]
    assert plan.src.tolist() == [[0, 2]]


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    metric = torch.randn(4, 50, 16)
    metric[3] = torch.nan
    together = match(metric, 12, 1)
    for b in range(3):
        assert_same(MergePlan(*(rows[b : b + 1] for rows in together)), match(metric[b : b + 1], 12, 1))


@pytest.mark.parametrize("shape", [(8,), (8, 4), (1, 1, 8, 4)])
def test_a_metric_that_is_not_three_dimensional_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, N, D\)"):
        match(torch.zeros(shape), 1)


def test_a_negative_r_is_refused() -> None:
    with pytest.raises(ValueError, match="r is -1"):
        match(torch.zeros(1, 8, 4), -1)
