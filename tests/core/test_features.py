"""Pooled features beside the logits, from one pass, in every family: what retrieval and other heads read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.core.recording import Calls
from tests.core.tuned_numbers import numbers
from tests.core.variants import Case
from tome_core import Recorded, UnsupportedModelError, wrap

Build = Callable[..., Any]

NUM_CLASSES = 10


@torch.no_grad()
@pytest.mark.parametrize("r", [0, 5, 1000])
def test_features_come_beside_the_same_logits(case: Case, r: int) -> None:
    model, merged, images = case
    outputs = merged.with_features()(images, r)
    logits, features = outputs[:, :NUM_CLASSES], outputs[:, NUM_CLASSES:]
    assert torch.equal(logits, merged(images, r))
    assert features.shape == (2, merged.num_features)
    wanted = merged.forward_head(merged.forward_tokens(images, r), pre_logits=True)
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-5)
    if r == 0:
        of_timm = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features, of_timm, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_model_itself_still_gives_logits_alone(case: Case) -> None:
    both = case.merged.with_features()
    assert (case.merged.gives_features, both.gives_features) == (False, True)
    assert case.merged(case.images).shape == (2, NUM_CLASSES)
    assert both.model is case.model


@torch.no_grad()
@pytest.mark.parametrize("r", [0, 5])
def test_a_model_without_a_classifier_gives_its_features_alone(case: Case, r: int) -> None:
    outputs = case.merged.with_features()(case.images, r)
    case.model.reset_classifier(0)
    headless = wrap(case.model)
    assert torch.equal(headless.with_features()(case.images, r), outputs[:, NUM_CLASSES:])
    assert torch.equal(headless(case.images, r), outputs[:, NUM_CLASSES:])
    assert headless.num_features == case.merged.num_features


@torch.inference_mode()
def test_fused_models_have_them(case: Case) -> None:
    try:
        fused = wrap(case.model, "fused")
    except UnsupportedModelError:
        pytest.skip("it cannot run fused")
    for r in (0, 5):
        outputs = fused.with_features()(case.images, r)
        assert torch.equal(outputs[:, :NUM_CLASSES], fused(case.images, r))
        torch.testing.assert_close(outputs, case.merged.with_features()(case.images, r), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tuned_numbers_make_the_features_of_their_bands_too(build: Build) -> None:
    merged, images = wrap(build()), torch.randn(2, 3, 96, 96)
    before = {r: merged.with_features()(images, r) for r in (0, 4)}
    merged.take_tuned(numbers(merged))
    both = merged.with_features()
    assert torch.equal(both(images, 0), before[0])
    tuned = merged.forward_head(merged.forward_tokens(images, 4), pre_logits=True)
    torch.testing.assert_close(both(images, 4)[:, NUM_CLASSES:], tuned, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both(images, 4), before[4], atol=1e-3)


@torch.no_grad()
def test_it_stays_so_whatever_else_is_made_of_the_model(build: Build) -> None:
    merged, images = wrap(build()), torch.randn(2, 3, 96, 96)
    outputs = merged.with_features()(images, 3)
    assert torch.equal(merged.with_features().plain()(images, 3), outputs)
    assert torch.equal(merged.plain().with_features()(images, 3), outputs)
    pixels = torch.randint(256, (2, 96, 96, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    by_pixels = merged.from_pixels(mean, std).with_features()
    assert torch.equal(by_pixels(pixels, 3), merged.with_features().from_pixels(mean, std)(pixels, 3))
    assert by_pixels(pixels, 3).shape == outputs.shape


@torch.no_grad()
def test_a_recording_has_them(build: Build, recorder: Calls) -> None:
    both, images = wrap(build()).with_features(), torch.randn(2, 3, 96, 96)
    fast = Recorded(both, 5)
    for _ in range(2):
        torch.testing.assert_close(fast(images), both(images, 5))
    assert recorder.shapes == [(2, NUM_CLASSES + 48)]


@pytest.mark.gpu
@torch.inference_mode()
def test_a_gpu_gives_them_beside_the_same_logits(build: Build) -> None:
    merged = wrap(build(embed_dim=192).cuda().bfloat16())
    images = torch.randn(2, 3, 96, 96, device="cuda", dtype=torch.bfloat16)
    for r in (0, 5):
        outputs = merged.with_features()(images, r)
        assert torch.equal(outputs[:, :NUM_CLASSES], merged(images, r))
        wanted = merged.forward_head(merged.forward_tokens(images, r), pre_logits=True)
        torch.testing.assert_close(outputs[:, NUM_CLASSES:], wanted, rtol=0.05, atol=0.05)
