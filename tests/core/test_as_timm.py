"""timm's own code takes a merging model as it takes the timm model inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.data.config import resolve_data_config
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim._optim_factory import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from tests.core.tuned_numbers import numbers
from tome_core import FixedR, MergedViT, Tokens, wrap

Build = Callable[..., Any]

NAMES = {
    "vit_tiny_patch16_224": 96,
    "vit_base_patch16_clip_224": 96,
    "deit_tiny_distilled_patch16_224": 96,
    "vit_small_patch16_dinov3": 96,
    "vit_small_patch16_rope_mixed_224": 96,
    "naflexvit_base_patch16_gap": 96,
    "vit_relpos_small_patch16_224": 96,
    "beit_base_patch16_224": 96,
    "qwen3_vit_88m": 96,
    "deepseek_vit_412m": 84,
}


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, build: Build) -> Any:
    return build(request.param, img_size=NAMES[request.param])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 96, 96)


def alike(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups as they can be compared: parameters by identity."""
    return [group | {"params": [id(parameter) for parameter in group["params"]]} for group in groups]


def test_attributes_are_those_of_the_timm_model(model: Any) -> None:
    merged = wrap(model)
    for name in ("num_classes", "num_features", "pretrained_cfg", "default_cfg", "feature_info", "global_pool"):
        assert getattr(merged, name) == getattr(model, name)
    for name in ("head", "num_prefix_tokens", "in_chans"):
        assert getattr(merged, name) is getattr(model, name)
    assert list(merged.blocks) == list(getattr(model, "encoder", model).blocks)
    assert merged.get_classifier() == model.get_classifier()
    assert not hasattr(merged, "no_such_thing")
    with pytest.raises(AttributeError, match="'MergedViT' object has no attribute 'no_such_thing'"):
        _ = merged.no_such_thing


def test_training_decays_what_it_decays_in_timm(model: Any) -> None:
    merged = wrap(model)
    for no_decay in (True, False):
        ours, theirs = (each.no_weight_decay() if no_decay else () for each in (merged, model))
        assert alike(param_groups_weight_decay(merged, 0.05, no_weight_decay_list=ours)) == alike(
            param_groups_weight_decay(model, 0.05, no_weight_decay_list=theirs)
        )
        given = param_groups_layer_decay(merged, no_weight_decay_list=ours, layer_decay=0.75)
        assert alike(given) == alike(param_groups_layer_decay(model, no_weight_decay_list=theirs, layer_decay=0.75))
        assert len({group["lr_scale"] for group in given}) >= 4  # stem, three blocks, head
    parameters = dict(merged.named_parameters())
    assert merged.no_weight_decay() & parameters.keys() == {
        f"model.{name}" for name in model.no_weight_decay() if f"model.{name}" in parameters
    }
    for coarse in (True, False):
        ours, theirs = (group_parameters(each, each.group_matcher(coarse), reverse=True) for each in (merged, model))
        assert ours == {f"model.{name}": group for name, group in theirs.items()}


def test_optimizers_are_made_of_it_as_of_the_timm_model(build: Build) -> None:
    model = build(depth=12)
    made = [create_optimizer_v2(each, "adamw", weight_decay=0.05, layer_decay=0.75) for each in (wrap(model), model)]
    ours, theirs = (alike(optimizer.param_groups) for optimizer in made)
    assert ours == theirs and len(ours) == 28


def test_data_and_features_are_set_up_as_for_the_timm_model(build: Build, images: Tensor) -> None:
    model = build()
    merged = wrap(model)
    assert resolve_data_config(model=merged) == resolve_data_config(model=model)
    wanted = FeatureGetterNet(build(), (0, 2))(images)
    for ours, theirs in zip(FeatureGetterNet(merged, (0, 2))(images), wanted, strict=True):
        assert torch.equal(ours, theirs)
    merged.r = 6
    assert all(patches.shape == (2, 48, 6, 6) for patches in FeatureGetterNet(merged, (0, 2))(images))
    FeatureGetterNet(merged, (0, 1))  # which prunes the model
    assert (merged.num_blocks, len(merged.token_counts())) == (2, 3)


def test_a_classifier_is_reset_in_place(model: Any) -> None:
    merged = wrap(model)
    before = merged.r, merged.num_tokens
    merged.reset_classifier(7)
    assert (model.num_classes, merged.num_classes) == (7, 7)
    side = NAMES.get(model.pretrained_cfg["architecture"], 96)
    assert merged(torch.randn(1, 3, side, side), 3).shape == (1, 7)
    assert (merged.r, merged.num_tokens) == before


def test_what_is_set_on_it_is_set_on_the_timm_model(build: Build, images: Tensor) -> None:
    model = build()
    merged = wrap(model)
    merged.head = nn.Linear(48, 5)
    assert model.head is merged.head and merged(images, 4).shape == (2, 5)
    merged.global_pool = "avg"
    assert model.global_pool == "avg" and merged(images, 0).shape == (2, 5)
    merged.of_the_user = 3
    assert merged.of_the_user == 3 and not hasattr(model, "of_the_user")
    merged.set_grad_checkpointing()
    assert model.grad_checkpointing
    assert list(merged.state_dict()) == [f"model.{name}" for name in model.state_dict()]


@torch.no_grad()
def test_tuned_numbers_follow_a_new_head_and_a_new_size(build: Build, images: Tensor) -> None:
    merged = wrap(build())
    merged.take_tuned(numbers(merged))
    merged(images, 4)
    merged.reset_classifier(5)
    assert merged(images, 4).shape == (2, 5)
    merged.set_input_size((64, 144))  # as many patches, but others
    assert merged(torch.randn(2, 3, 64, 144), 4).shape == (2, 5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "vit_relpos_small_patch16_224"])
def test_token_counts_follow_the_size(build: Build, name: str) -> None:
    merged = wrap(build(name))
    prefix = merged.num_prefix_tokens
    assert (merged.num_tokens, merged.max_r, merged.token_counts(4)[-1]) == (prefix + 36, 18, prefix + 24)
    merged.set_input_size((96, 160))
    assert (merged.num_tokens, merged.max_r, merged.token_counts(4)[-1]) == (prefix + 60, 30, prefix + 48)
    images = torch.randn(1, 3, 96, 160)
    assert merged.forward_tokens(images, 1000).x.shape[1] == merged.token_counts(1000)[-1] == prefix + 8
    assert merged.token_counts(4, (96, 160)) == merged.token_counts(4)
    with pytest.raises(ValueError, match="takes images of 96x160, not 96x96; set_input_size changes that"):
        merged.token_counts(4, (96, 96))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "naflexvit_base_patch16_gap"])
def test_token_counts_of_a_model_that_takes_any_size(build: Build, name: str) -> None:
    merged = wrap(build(name, **({} if "naflex" in name else {"dynamic_img_size": True})))
    for size in ((96, 160), (64, 64)):
        for r in (0, 4, 1000):
            tokens = merged.forward_tokens(torch.randn(1, 3, *size), r)
            assert merged.token_counts(r, size)[-1] == tokens.x.shape[1]


def test_features_are_a_tensor_as_in_timm(model: Any) -> None:
    merged, side = wrap(model), NAMES.get(model.pretrained_cfg["architecture"], 96)
    images = torch.randn(2, 3, side, side)
    theirs = model.forward_features(images)
    ours = merged.forward_features(images)
    assert torch.equal(ours, theirs.flatten(1, -2))
    if "naflex" not in model.pretrained_cfg["architecture"]:  # it counts at the size it was trained at
        torch.testing.assert_close(merged.forward_head(ours), model.forward_head(theirs), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged.forward_head(theirs), model.forward_head(theirs), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.forward_features(images, 5), merged.forward_tokens(images, 5).x)


def test_a_head_gets_the_sizes_that_it_weighs_by_or_refuses(build: Build, images: Tensor) -> None:
    by_class = wrap(build())
    for pre_logits in (True, False):
        features, tokens = by_class.forward_features(images, 4), by_class.forward_tokens(images, 4)
        assert torch.equal(by_class.forward_head(features, pre_logits), by_class.forward_head(tokens, pre_logits))
    by_mean = wrap(build(global_pool="avg"))
    features = by_mean.forward_features(images, 4)
    with pytest.raises(ValueError, match=r"weighs 25 tokens by their sizes.*forward_tokens\(images, r\), or Tokens\("):
        by_mean.forward_head(features)
    torch.testing.assert_close(by_mean.forward_head(by_mean.forward_tokens(images, 4)), by_mean(images, 4))
    assert by_mean.forward_head(Tokens(features)).shape == (2, 10)


def test_r_that_is_set_is_the_r_of_every_call_that_gives_none(build: Build, images: Tensor) -> None:
    merged = wrap(build())
    assert merged.r == 0
    unmerged = merged(images)
    merged.r = 5
    for given, wanted in (
        (merged(images), merged(images, 5)),
        (merged.forward_features(images), merged.forward_features(images, 5)),
        (merged.forward_tokens(images).x, merged.forward_tokens(images, 5).x),
        (merged.tokens_after([1], images)[0].x, merged.tokens_after([1], images, 5)[0].x),
        (merged.plain()(images), merged(images, 5)),
        (FixedR(merged)(images), merged(images, 5)),
        (merged(images, 0), unmerged),
    ):
        torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)
    assert merged.token_counts() == merged.token_counts(5) == (37, 32, 27, 22)
    merged.r = [4, 0, 2]
    assert torch.equal(merged(images), merged(images, [4, 0, 2]))
    assert not torch.equal(merged(images), unmerged)


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "r is -1; it must be 0 or more"),
        ([1, 2, 3, 4], ValueError, "lists 4 blocks; this model has 3"),
        ("8", TypeError, "it must be an integer, a list of integers or a Ramp"),
        ((8, -1.0), TypeError, r"r is \(8, -1.0\); a ramp is Ramp\(8, inflect=-1.0, rounding='published'\)"),
    ],
)
def test_a_wrong_r_is_refused_when_it_is_set(build: Build, r: Any, error: type[Exception], message: str) -> None:
    merged: MergedViT = wrap(build())
    with pytest.raises(error, match=message):
        merged.r = r
    assert merged.r == 0
