"""Dense features: every patch in its place, with the features of the token that it merged into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tome_core import MergedViT, unmerge, wrap

Build = Callable[..., Any]

NAMES = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224", "naflexvit_base_patch16_gap"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 96, 96)


@pytest.fixture(params=NAMES)
def merged(request: pytest.FixtureRequest, build: Build) -> MergedViT:
    return wrap(build(request.param))


@pytest.mark.parametrize("indices", [None, 2, [0, 2], [-1], [1]])
@pytest.mark.parametrize("norm", [False, True])
def test_r_0_is_timm(merged: MergedViT, images: Tensor, indices: Any, norm: bool) -> None:
    model: Any = merged.model
    for output_fmt in ("NCHW", "NLC"):
        options = {"indices": indices, "norm": norm, "output_fmt": output_fmt}
        expected = model.forward_intermediates(images, **options, intermediates_only=True)
        given = merged.forward_intermediates(images, **options)
        assert len(given) == len(expected)
        for ours, theirs in zip(given, expected, strict=True):
            assert isinstance(ours, Tensor)
            assert torch.equal(ours, theirs)


def test_prefix_tokens_come_along_when_asked(build: Build, images: Tensor) -> None:
    model = build(reg_tokens=4)
    given = wrap(model).forward_intermediates(images, 0, return_prefix_tokens=True)
    expected = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
    assert len(given) == 3
    for ours, theirs in zip(given, expected, strict=True):
        assert isinstance(ours, tuple)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_every_patch_has_the_features_of_the_token_it_merged_into(merged: MergedViT, images: Tensor) -> None:
    for last in range(3):
        r = [6] * (last + 1)
        (patches,) = merged.forward_intermediates(images, r, indices=[last], output_fmt="NLC", norm=True)
        assert isinstance(patches, Tensor)
        (tokens,) = merged.tokens_after([last], images, r)
        assert tokens.source is not None
        expected = unmerge(merged.family.norm(merged.model)(tokens.x), tokens.source)[:, merged.num_prefix_tokens :]
        torch.testing.assert_close(patches, expected)
        groups = [len(image.unique(dim=0)) for image in patches]
        assert groups == [36 - 6 * (last + 1)] * 2


def test_dropped_patches_leave_no_map(build: Build, images: Tensor) -> None:
    with pytest.raises(ValueError, match="18 patches are left of 6 x 6: patch dropout"):
        wrap(build(patch_drop_rate=0.5).train()).forward_intermediates(images, 4)


def test_a_map_has_the_shape_of_the_images(build: Build) -> None:
    merged = wrap(build(dynamic_img_size=True))
    (features,) = merged.forward_intermediates(torch.randn(2, 3, 96, 160), 4, indices=1)
    assert isinstance(features, Tensor)
    assert features.shape == (2, 48, 6, 10)


def test_blocks_after_the_last_one_wanted_do_not_run(build: Build, images: Tensor) -> None:
    model = build()
    model.blocks[2].register_forward_pre_hook(lambda module, inputs: pytest.fail("ran"))
    model.blocks[2].mlp.register_forward_pre_hook(lambda module, inputs: pytest.fail("ran"))
    assert len(wrap(model).forward_intermediates(images, 4, indices=[0, 1])) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": 4}, "indices is 4: the last 4 of 3 blocks"),
        ({"indices": 0}, "indices is 0"),
        ({"indices": [3]}, "names block 3; blocks lie between -3 and 2"),
        ({"indices": [0, -4]}, "names block -4"),
        ({"indices": []}, "indices is empty"),
        ({"output_fmt": "NHWC"}, "output_fmt is 'NHWC'; it must be 'NCHW' or 'NLC'"),
    ],
)
def test_wrong_options_are_refused(build: Build, images: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(build()).forward_intermediates(images, **options)
