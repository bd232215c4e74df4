"""Tuned numbers in models of every family: used at the `r` of their bands, and nowhere else; all else is shared."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.tuned_numbers import BANDS, having, numbers
from tests.core.variants import Case
from tome_core import MergedViT, Ramp, UnsupportedModelError, visualize, wrap
from tome_core.schedule import RLike
from tome_core.tuned import sharing, tunable

Build = Callable[..., Any]

OUTSIDE: list[RLike] = [0, 1, 2, 5, 6, 10, 1000, [7, 0, 0], Ramp(5), [0, 0, 3]]
INSIDE: list[tuple[RLike, int]] = [(3, 0), (4, 0), ([9], 0), ((0, 5, 6), 0), (Ramp(4), 0), (7, 1), ([9, 9, 9], 1)]
"""Each `r`, and the band that its mean lies in."""


def everything(merged: MergedViT, images: Tensor, r: RLike) -> list[Tensor]:
    """All that a model gives at one `r`."""
    tokens = merged.forward_tokens(images, r, track=True)
    after = merged.tokens_after([0, -1], images, r)
    maps: Any = merged.forward_intermediates(
        images, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True, r=r
    )
    found = [merged(images, r), tokens.x, tokens.size, tokens.source, merged.forward_head(tokens)]
    found += [tensor for kept in after for tensor in kept[:3]] + [tensor for pair in maps for tensor in pair]
    return [tensor for tensor in found + visualize.sources(merged, images, r, [1]) if tensor is not None]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    """The same but for the last bits, which may go by where a copied matrix lies in memory."""
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_bit_changes_outside_the_bands(case: Case) -> None:
    _, merged, images = case
    before = [everything(merged, images, r) for r in OUTSIDE]
    tuned = numbers(merged)
    assert merged.take_tuned(tuned) is merged and merged.tuned is tuned
    for r, wanted in zip(OUTSIDE, before, strict=True):
        assert merged.at(r) is merged
        assert_same(everything(merged, images, r), wanted)


@torch.no_grad()
def test_in_a_band_it_is_the_model_with_these_numbers(case: Case) -> None:
    model, merged, images = case
    tuned = numbers(merged)
    others = [wrap(having(model, band.tensors), "plain") for band in tuned.bands]
    wanted = [everything(others[band], images, r) for r, band in INSIDE]
    untuned = [merged(images, r) for r, _ in INSIDE]
    merged.take_tuned(tuned)
    for (r, _), expected, before in zip(INSIDE, wanted, untuned, strict=True):
        assert_close(everything(merged, images, r), expected)
        assert not torch.allclose(merged(images, r), before, atol=1e-3)
    assert_same([merged.take_tuned(None)(images, r) for r, _ in INSIDE], untuned)


@torch.inference_mode()
def test_fused_models_have_them(case: Case) -> None:
    model, _, images = case
    try:
        fused = wrap(model, "fused")
    except UnsupportedModelError:
        pytest.skip("it cannot run fused")
    fused.take_tuned(numbers(fused))
    assert fused.tuned is not None and fused.implementation(images).name == "fused"
    for band in fused.tuned.bands:
        other = wrap(having(model, band.tensors), "fused")
        for r in (band.low, band.high):
            got, wanted = fused.forward_tokens(images, r), other.forward_tokens(images, r)
            assert_close([fused(images, r), got.x], [other(images, r), wanted.x])


def test_all_else_is_shared(case: Case) -> None:
    model, merged, _ = case
    merged.take_tuned(numbers(merged))
    tuned_names = set(tunable(model, merged.family))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        merged.to(dtype)
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        several: Any = [merged.at(band[0]).model for band in BANDS]
        for twin in several:
            theirs = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers())
            assert list(theirs) == list(own)
            apart = {name for name in own if theirs[name] is not own[name]}
            first_names = {name for name, _ in model.named_parameters()}
            assert apart & first_names == tuned_names
            assert all(theirs[name].dtype == own[name].dtype for name in own)
            assert all(theirs[name].data_ptr() == own[name].data_ptr() for name in own if name not in apart)


def test_blocks_norms_biases_and_the_last_norm_are_tunable(case: Case) -> None:
    model, merged, _ = case
    own = tunable(model, merged.family)
    assert sum(tensor.numel() for tensor in own.values()) < 0.1 * sum(p.numel() for p in model.parameters())
    assert all(tensor.ndim == 1 for tensor in own.values())
    parts = [*merged.family.blocks(model), merged.family.norm(model)]
    wanted = {id(p) for part in parts for p in part.parameters() if p.ndim == 1}
    assert {id(p) for p in own.values()} == wanted
    head = {id(p) for p in model.head.parameters()}
    assert not head & wanted


def test_no_module_reaches_itself_by_other_ways_than_its_children(case: Case) -> None:
    """A shallow copy would compute with the numbers of the module that it was made of."""
    for module in case.model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                assert not isinstance(value, nn.Module | Tensor | MethodType), name
                if isinstance(value, list | tuple | dict):
                    held = value.values() if isinstance(value, dict) else value
                    assert not any(isinstance(each, nn.Module | Tensor | MethodType) for each in held), name


def test_a_module_with_two_places_is_replaced_in_both() -> None:
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Sequential(norm))
    twin: Any = sharing(model, {"0.bias": torch.ones(4)})
    assert twin[0] is twin[2] is twin[3][0] and torch.equal(twin[0].bias, torch.ones(4))
    assert twin[1] is model[1] and twin[0].weight is norm.weight and not norm.bias.any()


def test_a_parameter_with_two_names_is_replaced_under_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    twin: Any = sharing(model, {"0.bias": torch.ones(4)})
    assert twin[0].bias is twin[1].bias and twin[0].bias is not model[0].bias
    assert twin[1].weight is model[1].weight


def test_what_has_nothing_replaced_is_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    assert sharing(model, {}) is model


@pytest.mark.parametrize("r", [-1, [1] * 4, True, "3"])
def test_a_wrong_r_is_refused_as_before(build: Build, r: Any) -> None:
    merged = wrap(build())
    merged.take_tuned(numbers(merged))
    with pytest.raises((ValueError, TypeError), match=r"^(r is|the schedule lists)"):
        merged.at(r)
