"""Attention and the matching beside it, in one launch and in two: neither form tells in the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.operands import DEVICE, agree, exact_metric, gained, joint, random, random_sizes, same, valid
from tome_core.kernels import Bias, attention, matching, operators, reference
from tome_core.schedule import max_r

pytestmark = pytest.mark.usefixtures("by_kernels")

H = 3
CASES = [(9, 64, torch.bfloat16), (50, 64, torch.bfloat16), (150, 64, torch.bfloat16), (50, 32, torch.float16)]


@pytest.fixture(params=[True, False], ids=["one launch", "apart"])
def in_one_launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(matching, "FEW_SRC", 0)
    return bool(request.param)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every launch that attends and matches at once."""
    counted: list[int] = []
    launch: Callable[..., None] = attention._launch_match

    def counting(*args: Any, **kwargs: Any) -> None:
        counted.append(1)
        launch(*args, **kwargs)

    monkeypatch.setattr(attention, "_launch_match", counting)
    return counted


def attended(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Bias | None = None) -> Tensor:
    return reference.attend(q.float(), k.float(), v.float(), log_size, bias, H)


@pytest.mark.parametrize(("N", "D", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_by_a_metric_that_is_given(
    in_one_launch: bool, launches: list[int], N: int, D: int, dtype: torch.dtype, num_prefix_tokens: int
) -> None:
    q, k, v = joint(3, N, H, D, dtype)
    log_size, metric = random_sizes(3, N).log2(), exact_metric(3, N, D)
    for r in {1, max_r(N, num_prefix_tokens)}:
        y, groups = operators.attend_match(q, k, v, log_size, None, metric, H, r, num_prefix_tokens)
        agree(y, attended(q, k, v, log_size))
        same(groups, reference.match(metric.cpu(), r, num_prefix_tokens))
    assert bool(launches) == in_one_launch


@pytest.mark.parametrize(("N", "D", "dtype"), CASES, ids=str)
def test_by_the_keys(in_one_launch: bool, N: int, D: int, dtype: torch.dtype) -> None:
    q, k, v = joint(3, N, H, D, dtype)
    log_size, r = random_sizes(3, N).log2(), max_r(N, 1) // 2
    y, groups = operators.attend_match(q, k, v, log_size, None, None, H, r, 1)
    agree(y, attended(q, k, v, log_size))
    valid(groups, N, 1)
    metric = reference.metric(k, H)
    torch.testing.assert_close(gained(metric, groups), gained(metric, reference.match(metric, r, 1)))


def test_tokens_of_size_1(in_one_launch: bool) -> None:
    q, k, v = joint(1, 50, H, 64, torch.bfloat16)
    y, groups = operators.attend_match(q, k, v, None, None, None, H, 7, 1)
    agree(y, attended(q, k, v, None))
    valid(groups, 50, 1)


@pytest.mark.parametrize("B", [1, 2, 7, 20])
def test_the_programs_that_match_reach_every_image(in_one_launch: bool, B: int) -> None:
    """One head and one tile of tokens: as many programs match as attend."""
    q, k, v = joint(B, 12, 1, 64, torch.bfloat16)
    metric = exact_metric(B, 12, 64)
    _, groups = operators.attend_match(q, k, v, None, None, metric, 1, 3, 1)
    same(groups, reference.match(metric.cpu(), 3, 1))


APART = [("float32", 50, 64, torch.float32, False), ("wide heads", 50, 72, torch.bfloat16, False)]
APART += [("many tokens", 300, 64, torch.bfloat16, False), ("biased", 50, 64, torch.bfloat16, True)]


@pytest.mark.parametrize(("why", "N", "D", "dtype", "biased"), APART, ids=[case[0] for case in APART])
def test_what_one_launch_is_not_made_for(
    launches: list[int], why: str, N: int, D: int, dtype: torch.dtype, biased: bool
) -> None:
    q, k, v = joint(1, N, H, D, dtype)
    codes = torch.randint(0, 9, (1, N), dtype=torch.int32).to(DEVICE)
    bias, metric = Bias(random(H, 17), codes, codes) if biased else None, exact_metric(1, N, D)
    y, groups = operators.attend_match(q, k, v, None, bias, metric, H, N // 7, 1)
    agree(y, attended(q, k, v, None, bias))
    same(groups, reference.match(metric.cpu(), N // 7, 1))
    assert not launches


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_keys_that_are_not_numbers_still_merge(in_one_launch: bool) -> None:
    q, k, v = joint(2, 50, H, 64, torch.bfloat16)
    k[0, 3:9], k[1] = torch.nan, torch.nan
    for r in (1, 11, max_r(50, 1)):
        _, groups = operators.attend_match(q, k, v, None, None, None, H, r, 1)
        valid(groups, 50, 1)


@pytest.mark.gpu
def test_every_number_of_tokens() -> None:
    for N in range(3, 256):
        q, k, v = joint(2, N, H, 64, torch.bfloat16)
        log_size, metric, r = random_sizes(2, N).log2(), exact_metric(2, N, 64), max(max_r(N, 1) // 3, 1)
        y, groups = operators.attend_match(q, k, v, log_size, None, metric, H, r, 1)
        agree(y, attended(q, k, v, log_size))
        same(groups, reference.match(metric.cpu(), r, 1))


@pytest.mark.gpu
def test_a_recording_matches_in_a_stream_of_its_own() -> None:
    q, k, v = joint(64, 197, H, 64, torch.bfloat16)
    line = operators.attend_match(q, k, v, None, None, None, H, 13, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, groups = operators.attend_match(q, k, v, None, None, None, H, 13, 1)
    for _ in range(20):
        graph.replay()
        valid(groups, 197, 1)
        agree(y, line[0].float())
