"""Dense features: every patch in its place, with the features of the token that it merged into."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tome_core import MergedViT, unmerge, wrap

Build = Callable[..., Any]

NAMES = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224", "naflexvit_base_patch16_gap"]


FORMS: list[dict[str, Any]] = [
    {},
    {"output_fmt": "NLC"},
    {"intermediates_only": True},
    {"stop_early": True},
    {"output_dict": True},
    {"output_dict": True, "intermediates_only": True},
]


def of_timm(model: Any, images: Tensor, indices: Any, options: dict[str, Any]) -> Any:
    """What timm's own method gives; a dictionary made of it where the class has no `output_dict`."""
    if not options.get("output_dict") or "output_dict" in inspect.signature(model.forward_intermediates).parameters:
        return model.forward_intermediates(images, indices, **options)
    given = model.forward_intermediates(images, indices, **{k: v for k, v in options.items() if k != "output_dict"})
    if options.get("intermediates_only"):
        return {"image_intermediates": given}
    return {"image_features": given[0], "image_intermediates": given[1]}


def same(ours: Any, theirs: Any) -> None:
    """Holds results against each other, all the way down. Final features of a grid may come as rows of tokens."""
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs if ours.shape == theirs.shape else theirs.flatten(1, -2))
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        same(list(ours.values()), [theirs[key] for key in ours])
    else:
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)


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
    for options in FORMS:
        options = options | {"norm": norm}
        same(merged.forward_intermediates(images, indices, **options), of_timm(model, images, indices, options))
    for reshape in (False, True):
        options = {"n": 2 if indices is None else indices, "reshape": reshape, "norm": norm}
        expected = model.forward_intermediates(
            images, options["n"], norm=norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )
        same(merged.get_intermediate_layers(images, **options), expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "qwen3_vit_88m"])
def test_prefix_tokens_come_along_when_asked(build: Build, images: Tensor, name: str) -> None:
    model = build(name, **({"reg_tokens": 4} if name.startswith("vit_tiny") else {}))
    merged = wrap(model)
    for options in FORMS:
        if options.get("output_dict") and "relpos" in name:
            continue  # timm's has no such argument
        options = options | {"return_prefix_tokens": True}
        if "relpos" in name:
            with pytest.raises(NameError):  # timm forgets that it has none
                of_timm(model, images, None, options)
            given = merged.forward_intermediates(images, None, **options)
            options["return_prefix_tokens"] = False
            same(given, of_timm(model, images, None, options))
        else:
            same(merged.forward_intermediates(images, None, **options), of_timm(model, images, None, options))


def test_merged_features_come_beside_dense_intermediates(merged: MergedViT, images: Tensor) -> None:
    features, (last,) = merged.forward_intermediates(images, [-1], norm=True, output_fmt="NLC", r=6)
    tokens = merged.forward_tokens(images, 6, track=True)
    assert torch.equal(features, tokens.x)
    assert torch.equal(last, tokens.unmerged()[:, merged.num_prefix_tokens :])
    merged.r = 6
    assert torch.equal(merged.forward_intermediates(images, [-1])[0], features)
    with pytest.raises(TypeError, match="attn_mask"):
        merged.forward_intermediates(images, attn_mask=torch.zeros(1))  # type: ignore[call-arg]


def test_every_patch_has_the_features_of_the_token_it_merged_into(merged: MergedViT, images: Tensor) -> None:
    for last in range(3):
        r = [6] * (last + 1)
        _, (patches,) = merged.forward_intermediates(images, [last], output_fmt="NLC", norm=True, r=r)
        (tokens,) = merged.tokens_after([last], images, r)
        assert tokens.source is not None
        expected = unmerge(merged.family.norm(merged.model)(tokens.x), tokens.source)[:, merged.num_prefix_tokens :]
        torch.testing.assert_close(patches, expected)
        groups = [len(image.unique(dim=0)) for image in patches]
        assert groups == [36 - 6 * (last + 1)] * 2


def test_dropped_patches_leave_no_map(build: Build, images: Tensor) -> None:
    with pytest.raises(ValueError, match="18 patches are left of 36: patch dropout"):
        wrap(build(patch_drop_rate=0.5).train()).forward_intermediates(images, r=4)


def test_a_map_has_the_shape_of_the_images(build: Build) -> None:
    merged = wrap(build(dynamic_img_size=True))
    _, (features,) = merged.forward_intermediates(torch.randn(2, 3, 96, 160), 1, r=4)
    assert features.shape == (2, 48, 6, 10)


def test_blocks_after_the_last_one_wanted_do_not_run(build: Build, images: Tensor) -> None:
    model = build()
    model.blocks[2].register_forward_pre_hook(lambda module, inputs: pytest.fail("ran"))
    model.blocks[2].mlp.register_forward_pre_hook(lambda module, inputs: pytest.fail("ran"))
    stops: list[dict[str, Any]] = [{"stop_early": True}, {"intermediates_only": True}]
    for early in stops:
        assert len(wrap(model).forward_intermediates(images, [0, 1], r=4, **early)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": 4}, "indices is 4; a number of last blocks must lie between 1 and 3"),
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
