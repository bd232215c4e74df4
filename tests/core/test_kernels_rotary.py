"""The rotary kernel against plain PyTorch: both ways to pair channels, tables for all heads and for each."""

from __future__ import annotations

import pytest
import torch

from tests.core.operands import agree, joint, random, random_sizes
from tome_core.kernels import operators, reference

pytestmark = pytest.mark.usefixtures("by_kernels")

WAYS = [(halved, shared) for halved in (False, True) for shared in (False, True)]
OTHERS = [(64, torch.float32), (64, torch.float16), *[(D, torch.bfloat16) for D in (16, 32, 72, 88, 128)]]
CASES = [(64, torch.bfloat16, *way, sized) for way in WAYS for sized in (False, True)]
CASES += [(*kind, *way, way[0]) for kind in OTHERS for way in WAYS[1:3]]


@pytest.mark.parametrize(("D", "dtype", "halved", "shared", "sized"), CASES, ids=str)
def test_turned_as_a_table_says(D: int, dtype: torch.dtype, halved: bool, shared: bool, sized: bool) -> None:
    H, B, N = 3, 2, 37
    q, k, _ = joint(B, N, H, D, dtype)
    table = random(B if sized else 1, N, 2 * D * (1 if shared else H))
    size = random_sizes(B, N) if sized else None
    got = operators.rotate(q, k, table, size, H, halved)
    wanted = reference.rotate(q.float(), k.float(), table, size, H, halved)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32]
    for a, b in zip(got, wanted, strict=True):
        assert a.is_contiguous()
        agree(a, b)


@pytest.mark.parametrize("M", [1, 2])
def test_few_queries(M: int) -> None:
    q, k = random(2, M, 192, dtype=torch.bfloat16), random(2, 37, 384, dtype=torch.bfloat16)[..., :192]
    table = random(2, 37, 128)
    got = operators.rotate(q, k, table, random_sizes(2, 37) * 0 + 1, 3, False)
    for a, b in zip(got, reference.rotate(q.float(), k.float(), table, None, 3, False), strict=True):
        agree(a, b)


def test_a_table_in_half_precision() -> None:
    q, k, _ = joint(1, 37, 3, 64, torch.bfloat16)
    table, size = random(1, 37, 384, dtype=torch.bfloat16), random_sizes(1, 37)
    for a, b in zip(
        operators.rotate(q, k, table, size, 3, True),
        reference.rotate(q.float(), k.float(), table, size, 3, True),
        strict=True,
    ):
        agree(a, b)


def test_the_metric_is_that_of_keys_before_they_turn() -> None:
    q, k, _ = joint(2, 37, 3, 64, torch.float32)
    k[0, 4] = 0
    _, turned, found = operators.rotate(q, k, random(1, 37, 128), None, 3, False)
    agree(found, reference.metric(k, 3))
    assert (found[0, 4] == 0).all() and (turned[0, 4] == 0).all()


def test_inputs_stay_as_they_are() -> None:
    q, k, _ = joint(2, 37, 3, 64, torch.bfloat16)
    before = q.clone(), k.clone()
    operators.rotate(q, k, random(1, 37, 128), None, 3, True)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
