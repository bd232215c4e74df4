"""Pixels in the place of images, on both paths: what normalising by hand gives, for everything a model may be given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tome_core
from benchmarks import coverage
from tome_core import MergedViT, kernels
from tome_core.embedding import Normalisation
from tome_core.families import family_of

Build = Callable[..., Any]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_r26_s32_224",
    "aimv2_large_patch14_224",
    "eva02_base_patch14_224",
    "vit_base_patch16_dinov3",
    "vit_base_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_relpos_base_patch16_224",
    "naflexvit_base_patch16_gap",
    "qwen3_vit_88m",
]
NAMES = [name for name in NAMES if name in timm.list_models()]  # older timm lacks some


@cache
def small(name: str) -> tuple[nn.Module, int]:
    return coverage.build(name)


@pytest.fixture(params=["plain", "fused"])
def path(request: pytest.FixtureRequest) -> Any:
    return request.param


def random_pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def by_hand(pixels: Tensor) -> Tensor:
    """Images in float64, the way that every tutorial has it."""
    images = pixels.permute(0, 3, 1, 2).double() / 255
    return (images - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_normalised_on_the_way(path: Any, name: str) -> None:
    model, side = small(name)
    merged, pixels = tome_core.wrap(model, path), random_pixels(2, side, side, 3)
    images = by_hand(pixels).float()
    of_pixels = merged.from_pixels(MEAN, STD)
    assert of_pixels.implementation(pixels).name == path
    for r in (0, 3):
        close(of_pixels(pixels, r), merged(images, r))


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_cut_patches_are_what_the_models_own_embedding_makes(name: str) -> None:
    """A product and what is the same for every image add up to all that the model does before its blocks."""
    model, side = small(name)
    family = family_of(model)
    weight = family.projection(model, (side, side))
    if weight is None:
        assert name in ("vit_base_r26_s32_224", "aimv2_large_patch14_224")  # convolutions, a norm
        return
    images = torch.randn(2, 3, side, side)
    patches = kernels.cut(images, weight.shape[-1], torch.float32)[..., : weight[0].numel()] @ weight.flatten(1).t()
    table, positions, _ = family.embed_colour(model, None, (side, side))
    wanted, wanted_positions, _ = family.embed(model, images)
    got = table.repeat(2, 1, 1)
    got[:, got.shape[1] - patches.shape[1] :] += patches
    close(got, wanted)
    assert (positions is None) == (wanted_positions is None)
    if positions is not None and wanted_positions is not None:
        close(positions, wanted_positions)


@torch.inference_mode()
@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(build: Build, path: Any, channels: int) -> None:
    merged, pixels = tome_core.wrap(build(in_chans=channels), path), random_pixels(2, 96, 96, channels)
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    close(merged.from_pixels([0.5] * channels, [0.25] * channels)(pixels, 3), merged(images, 3))


@torch.inference_mode()
def test_pixels_may_lie_as_they_like(build: Build, path: Any) -> None:
    merged, planes = tome_core.wrap(build(), path).from_pixels(MEAN, STD), random_pixels(2, 3, 96, 96)
    pixels = planes.permute(0, 2, 3, 1)
    close(merged(pixels, 3), merged(pixels.contiguous(), 3))
    close(merged(pixels[:1], 3), merged(pixels, 3)[:1])


@torch.inference_mode()
def test_images_may_lie_as_they_like(build: Build, path: Any) -> None:
    merged, images = tome_core.wrap(build(), path), torch.randn(2, 3, 96, 96)
    wanted = merged(images, 3)
    close(merged(images.contiguous(memory_format=torch.channels_last), 3), wanted)
    close(merged(images[:1].expand(2, -1, -1, -1), 3), wanted[:1].expand(2, -1))


@torch.inference_mode()
def test_pixels_of_other_sizes(build: Build, path: Any) -> None:
    merged, pixels = tome_core.wrap(build(dynamic_img_size=True), path), random_pixels(2, 64, 128, 3)
    close(merged.from_pixels(MEAN, STD)(pixels, 3), merged(by_hand(pixels).float(), 3))
    with pytest.raises(AssertionError, match="Input height"):
        tome_core.wrap(build(), path).from_pixels(MEAN, STD)(pixels)


def test_gradients_lead_to_the_plain_path(build: Build, path: Any) -> None:
    model, pixels = build(), random_pixels(2, 96, 96, 3)
    merged = tome_core.wrap(model, path).from_pixels(MEAN, STD)
    merged(pixels, 3).sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().max() > 0


@torch.inference_mode()
def test_dense_features_of_pixels(build: Build, path: Any) -> None:
    merged, pixels = tome_core.wrap(build(dynamic_img_size=True), path), random_pixels(2, 64, 128, 3)
    _, (got,) = merged.from_pixels(MEAN, STD).forward_intermediates(pixels, 1, r=3)
    _, (wanted,) = merged.forward_intermediates(by_hand(pixels).float(), 1, r=3)
    assert isinstance(got, Tensor) and isinstance(wanted, Tensor)
    close(got, wanted)
    of_pixels = merged.from_pixels(MEAN, STD)
    close(of_pixels.forward_tokens(pixels, 3, track=True).x, of_pixels.forward_tokens(pixels, 3).x)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_in_half_precision(build: Build, path: Any, dtype: torch.dtype) -> None:
    pixels = random_pixels(4, 96, 96, 3)
    wanted = tome_core.wrap(build())(by_hand(pixels).float())
    got = tome_core.wrap(build().to(dtype), path).from_pixels(MEAN, STD)(pixels)
    assert got.dtype == dtype and (got.float() - wanted).norm() < 0.03 * wanted.norm()


@torch.inference_mode()
def test_pixels_stay_as_they_are(build: Build, path: Any) -> None:
    pixels = random_pixels(2, 96, 96, 3)
    before = pixels.clone()
    tome_core.wrap(build(), path).from_pixels(MEAN, STD)(pixels, 3)
    assert torch.equal(pixels, before)


def test_bytes_need_a_normalisation(build: Build, path: Any) -> None:
    merged = tome_core.wrap(build(), path)
    merged.from_pixels(MEAN, STD)  # another model: this one stays as it is
    for pixels in (random_pixels(2, 96, 96, 3), random_pixels(2, 3, 96, 96)):
        with torch.inference_mode(), pytest.raises(ValueError, match="images are uint8; .*from_pixels"):
            merged(pixels)
    with pytest.raises(ValueError, match="images are uint8"):
        merged.forward_intermediates(random_pixels(2, 3, 96, 96))


def test_a_model_of_pixels_keeps_what_it_was(build: Build) -> None:
    merged = tome_core.wrap(build(), "plain").from_pixels(MEAN, STD)
    assert isinstance(merged, MergedViT)
    assert merged.implementation(random_pixels(1, 96, 96, 3)).reason == "asked for"
    assert merged.plain().implementation(random_pixels(1, 96, 96, 3)).reason == "asked for"


def test_a_normalisation_is_a_factor_and_a_colour() -> None:
    normalisation, cpu = Normalisation(MEAN, STD), torch.device("cpu")
    pixels = random_pixels(1, 4, 4, 3)
    images = normalisation(pixels, torch.float32)
    torch.testing.assert_close(images, by_hand(pixels).float())
    steps = pixels.permute(0, 3, 1, 2).float() - 128
    factor, grey = normalisation.factor(cpu)[:, None, None], normalisation.grey(cpu)[:, None, None]
    torch.testing.assert_close(steps * factor + grey, images)
