"""Numbers that strain their format: sizes past what half precision counts, sums past what it holds, empty keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tome_core import match, merge, wrap

Build = Callable[..., Any]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]

seeds = st.integers(0, 2**32)


def strange(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, values: list[float]) -> Tensor:
    """Normal numbers, about half of them replaced by one of `values`."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    chosen = torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.5, chosen, x).to(dtype)


@given(seeds, st.sampled_from(DTYPES), st.integers(0, 3), st.integers(2, 20), st.integers(1, 9))
def test_whatever_the_metric_holds_a_plan_names_tokens_that_exist(
    seed: int, dtype: torch.dtype, prefix: int, patches: int, r: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [0.0, 1e-30, 1e30, math.inf, -math.inf, math.nan]
    plan = match(strange(generator, (2, prefix + patches, 3), dtype, values), r, prefix)
    everyone = torch.arange(prefix + patches).expand(2, -1)
    assert torch.equal(torch.cat([plan.keep, plan.src], dim=1).sort(dim=1).values, everyone)
    joined = plan.keep.gather(1, plan.dst)  # fails by itself where a row does not exist
    assert joined.min() >= prefix
    assert (joined % 2 == 1).all()


@given(seeds, st.sampled_from(HALVES), st.integers(2, 20), st.integers(1, 9))
def test_a_mean_lies_among_its_members_however_large_they_and_their_sizes_are(
    seed: int, dtype: torch.dtype, N: int, r: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(dtype).max
    x = strange(generator, (2, N, 3), dtype, [largest, -largest, largest / 2, 0.0])
    size = torch.randint(1, 10**6, (2, N), generator=generator).float()
    plan = match(torch.randn(2, N, 4, generator=generator), r)
    merged, _ = merge(plan, x, size)
    for b in range(2):
        for row, value in enumerate(merged[b]):
            members = x[b, [plan.keep[b, row], *plan.src[b, plan.dst[b] == row]]]
            assert (members.amin(dim=0) <= value).all()
            assert (value <= members.amax(dim=0)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_precision_model_counts_tokens_past_256_exactly(build: Build, dtype: torch.dtype) -> None:
    merged = wrap(build(img_size=288, depth=9)).to(dtype)  # 324 patches, which end as one
    tokens = merged.forward_tokens(torch.randn(1, 3, 288, 288, dtype=dtype), 1000)
    assert tokens.size is not None
    assert tokens.size.dtype == torch.float32
    assert tokens.size.tolist() == [[1, 324]]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_keys_of_no_length_merge_in_order_and_spoil_nothing(build: Build, dtype: torch.dtype) -> None:
    model = build()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[48:96] = 0
            block.attn.qkv.bias[48:96] = 0
    merged, images = wrap(model).to(dtype), torch.randn(2, 3, 96, 96, dtype=dtype)
    assert merged(images, 8).isfinite().all()
    source = merged.forward_tokens(images, [8], track=True).source
    assert source is not None
    together = [row.bincount(minlength=29).argmax() for row in source]
    assert [(row == first).nonzero().flatten().tolist() for row, first in zip(source, together, strict=True)] == [
        [1, 2, 4, 6, 8, 10, 12, 14, 16]  # the first dst and the first eight src
    ] * 2


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
def test_a_broken_image_spoils_none_of_its_batch_mates(build: Build, value: float) -> None:
    merged, images = wrap(build()), torch.randn(3, 3, 96, 96)
    alone = merged(images[:2], 8)
    images[2] = value
    torch.testing.assert_close(merged(images, 8)[:2], alone, rtol=1e-5, atol=1e-5)
