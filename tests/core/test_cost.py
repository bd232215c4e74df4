"""The arithmetic of a schedule: counted from dimensions as torch counts it in the running model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tome_core import UnsupportedModelError, wrap
from tome_core.cost import Dimensions, flops
from tome_core.families.dimensions import dimensions

Build = Callable[..., Any]

VIT_TI = Dimensions(
    num_tokens=197,
    num_prefix_tokens=1,
    num_blocks=12,
    width=192,
    attention_width=192,
    head_width=64,
    mlp_weights=2 * 192 * 768,
    patch_inputs=3 * 16 * 16,
    head_weights=192 * 1000,
    prefix_only_last=False,
)
SCHEDULES = [(0, 0, 0), (3, 5, 7), (8, 0, 2), (0, 10, 0), (18, 9, 9)]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 84}),
    ("aimv2_large_patch14_224", {"img_size": 84}),  # a gated MLP
    ("eva_giant_patch14_224", {"img_size": 84}),
    ("vit_base_patch16_rpn_224", {}),
]


@pytest.mark.parametrize(("name", "overrides"), MODELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_count_is_that_of_the_running_model(
    name: str, overrides: dict[str, Any], schedule: tuple[int, ...], build: Build
) -> None:
    merged = wrap(build(name, **overrides))
    side = overrides.get("img_size", 96)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merged(torch.zeros(2, 3, side, side), schedule)
    assert 2 * flops(dimensions(merged), schedule) == counter.get_total_flops()


@pytest.mark.parametrize(("r", "gmacs"), [(0, 1.253), (8, 0.924), (13, 0.731), (16, 0.621)])
def test_vit_tiny_costs_what_the_literature_counts(r: int, gmacs: float) -> None:
    # The figures leave out matching and merging, 1 % at most.
    counted = flops(VIT_TI, (r,) * 12) / 2e9
    assert gmacs <= counted < 1.012 * gmacs


def test_the_last_block_computes_prefix_tokens_alone_where_nothing_else_is_read() -> None:
    lean = replace(VIT_TI, prefix_only_last=True)
    schedule = (13,) * 12
    assert flops(lean, schedule) == flops(lean, (*schedule[:-1], 0)) < 0.98 * flops(VIT_TI, schedule)


@given(st.lists(st.integers(0, 60), min_size=12, max_size=12), st.integers(0, 11), st.integers(1, 20), st.booleans())
def test_merging_more_never_costs_more(schedule: list[int], block: int, more: int, prefix_only_last: bool) -> None:
    model = replace(VIT_TI, prefix_only_last=prefix_only_last)
    merging_more = [r + more * (i == block) for i, r in enumerate(schedule)]
    # Less may be left to merge in a later block, whose own r is then clipped: the same tokens go, earlier.
    assert flops(model, merging_more) <= flops(model, schedule)


def test_a_schedule_for_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="lists 3 blocks; this model has 12"):
        flops(VIT_TI, (1, 2, 3))


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "vit_base_patch16_xp_224", "vit_small_patch16_18x2_224"]
)
def test_arithmetic_of_another_kind_is_refused(name: str, build: Build) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be counted"):
        dimensions(wrap(build(name)))
