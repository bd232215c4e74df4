"""The kernels of matching against plain PyTorch: the same pairs, ties and all, and a valid plan whatever comes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.core.operands import DEVICE, DTYPES, agree, exact_metric, gained, random, same, valid
from tome_core.kernels import matching, operators, reference
from tome_core.kernels.groups import groups_of, plan_of
from tome_core.matching import match as match_plan
from tome_core.schedule import max_r

pytestmark = pytest.mark.usefixtures("by_kernels")


@pytest.fixture(params=[0, 1 << 30], ids=["a program an image", "several programs an image"])
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MANY_IMAGES", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "num_heads", "D"), [(3, 1, 64), (50, 3, 72), (33, 4, 32)])
def test_metric(dtype: torch.dtype, N: int, num_heads: int, D: int) -> None:
    k = random(2, N, 2 * num_heads * D, dtype=dtype)[..., num_heads * D :]
    k[0, 1] = 0
    got = operators.metric(k, num_heads)
    agree(got, reference.metric(k, num_heads))
    assert (got[0, 1] == 0).all()


@pytest.mark.parametrize("D", [16, 64, 72, 128])
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
@pytest.mark.usefixtures("spread")
def test_the_same_pairs(D: int, num_prefix_tokens: int) -> None:
    for N in (7, 64, 197):
        metric = exact_metric(2, N, D)
        for r in {1, max(max_r(N, num_prefix_tokens) // 3, 1), max_r(N, num_prefix_tokens)}:
            wanted = reference.match(metric.cpu(), r, num_prefix_tokens)
            same(operators.match(metric, r, num_prefix_tokens), wanted)


@pytest.mark.parametrize("N", [3, 4, 31, 129, 257, 577, 600])
def test_many_tokens(N: int) -> None:
    metric = exact_metric(1, N, 64)
    for r in {1, max_r(N, 1)}:
        same(operators.match(metric, r, 1), reference.match(metric.cpu(), r, 1))


@pytest.mark.gpu
@pytest.mark.usefixtures("spread")
def test_every_number_of_tokens() -> None:
    for N in range(3, 601):
        metric = exact_metric(2, N, 64)
        for r in {1, max(max_r(N, 1) // 3, 1), max_r(N, 1)}:
            same(operators.match(metric, r, 1), reference.match(metric.cpu(), r, 1))


@pytest.mark.gpu
def test_more_tokens_than_any_model_has() -> None:
    for N in (1374, 2500, 4097):
        metric = exact_metric(2, N, 64)
        same(operators.match(metric, N // 3, 1), reference.match(metric.cpu(), N // 3, 1))


@pytest.mark.parametrize("B", [1, 64])
def test_a_batch_of_one_and_one_of_many(B: int) -> None:
    metric = exact_metric(B, 40, 64)
    same(operators.match(metric, 11, 1), reference.match(metric.cpu(), 11, 1))


@settings(max_examples=15)
@given(st.integers(3, 60), st.integers(0, 3), st.data())
def test_every_plan_is_valid_and_as_good(N: int, num_prefix_tokens: int, data: st.DataObject) -> None:
    most = max_r(N, num_prefix_tokens)
    assume(most > 0)
    r = data.draw(st.integers(1, most))
    torch.manual_seed(N)
    metric = reference.metric(torch.randint(-1, 2, (2, N, 16)).to(DEVICE), 1)  # some ties, up to rounding
    got = operators.match(metric, r, num_prefix_tokens)
    valid(got, N, num_prefix_tokens)
    torch.testing.assert_close(gained(metric, got), gained(metric, reference.match(metric, r, num_prefix_tokens)))


@pytest.mark.usefixtures("spread")
def test_equal_tokens_merge_the_earlier_first() -> None:
    metric = torch.zeros(1, 150, 64, device=DEVICE)
    metric[..., 0] = 1
    for r in (1, 4, 74):
        same(operators.match(metric, r, 1), reference.match(metric.cpu(), r, 1))


@pytest.mark.usefixtures("spread")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_what_is_not_a_number_merges_somewhere() -> None:
    metric = reference.metric(random(3, 150, 64), 1)
    metric[0, 5:9], metric[1], metric[2, ::2, 3] = torch.nan, torch.nan, torch.inf
    for r in (1, 7, max_r(150, 1)):
        valid(operators.match(metric, r, 1), 150, 1)


@pytest.mark.usefixtures("spread")
def test_the_same_metric_gives_the_same_plan() -> None:
    metric = operators.metric(random(3, 130, 192, dtype=torch.bfloat16), 3)
    first = operators.match(metric, 31, 1)
    for _ in range(3):
        same(operators.match(metric, 31, 1), first)


def test_forms_of_matching_agree_on_any_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = reference.metric(random(3, 130, 64), 1)
    spread = operators.match(metric, 31, 1)
    monkeypatch.setattr(matching, "MANY_IMAGES", 0)
    same(operators.match(metric, 31, 1), spread)


@settings(max_examples=40)
@given(st.integers(3, 40), st.integers(0, 2), st.data())
def test_groups_are_the_plan_by_rows(N: int, num_prefix_tokens: int, data: st.DataObject) -> None:
    plan = match_plan(torch.randn(2, N, 8), data.draw(st.integers(0, N)), num_prefix_tokens)
    groups = groups_of(plan)
    valid(groups, N, min(num_prefix_tokens, N))
    back = plan_of(groups)
    assert torch.equal(back.keep, plan.keep) and torch.equal(back.target(), plan.target())


@pytest.mark.gpu
def test_no_r_waits_for_a_compiler() -> None:
    """Numbers of tokens are arguments of a kernel, not part of it."""
    metric = exact_metric(2, 64, 64)
    operators.match(metric, 3, 1)
    compiled = len(matching._launch_match.compiled)
    for r in range(4, 20):
        operators.match(exact_metric(2, 60 + r, 64), r, 1)
    assert len(matching._launch_match.compiled) == compiled
