"""A patched model merges in its own `forward`, and is in all else the timm model that it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tome_core import Ramp, UnsupportedModelError, patch, wrap

Build = Callable[..., Any]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 96, 96)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_medium_patch16_gap_240"])
def test_it_computes_as_a_wrapped_model_does(build: Build, images: Tensor, name: str) -> None:
    model, merged = build(name), wrap(build(name))
    assert patch(model, r=5) is model
    for r in (5, 0, [4, 0, 2], Ramp(4)):
        model.r = r
        assert model.r == r
        assert torch.equal(model(images), merged(images, r))
        assert torch.equal(model.forward_features(images), merged.forward_features(images, r))
        features, (dense,) = model.forward_intermediates(images, [1])
        wanted, (wanted_dense,) = merged.forward_intermediates(images, [1], r=r)
        assert torch.equal(features, wanted) and torch.equal(dense, wanted_dense)
    assert torch.equal(model(images, 3), merged(images, 3))
    (layer,) = model.get_intermediate_layers(images)
    assert torch.equal(layer, model.forward_intermediates(images, 1, output_fmt="NLC")[1][0])


def test_it_stays_the_timm_model_that_it_was(build: Build, images: Tensor) -> None:
    model: Any = build()
    state, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    modules = [name for name, _ in model.named_modules()]
    unmerged = model(images)
    patch(model)
    assert issubclass(type(model), VisionTransformer)
    assert list(model.state_dict()) == state and [id(p) for p in model.parameters()] == parameters
    assert [name for name, _ in model.named_modules()] == modules
    torch.testing.assert_close(model(images), unmerged, rtol=1e-5, atol=1e-5)
    model.r = 6
    assert (model(images) - unmerged).abs().max() > 1e-3


def test_changes_of_the_model_are_seen(build: Build, images: Tensor) -> None:
    model = patch(build(), r=4)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    model.head = nn.Linear(48, 7)
    assert model(images).shape == (2, 7)
    model.train()
    model.set_grad_checkpointing()
    model(images).sum().backward()
    assert model.cls_token.grad.abs().max() > 0
    model.eval().double()
    assert model(images.double()).dtype == torch.float64
    model.set_input_size((64, 64))
    assert model(torch.randn(1, 3, 64, 64).double()).shape == (1, 7)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "save"])
def test_copies_have_weights_of_their_own(build: Build, images: Tensor, through: str) -> None:
    model = patch(build(), r=4)
    if through == "deepcopy":
        other = copy.deepcopy(model)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    before = model(images)
    assert other.r == 4 and torch.equal(other(images), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.r = 0
    assert torch.equal(model(images), before) and model.r == 4
    assert not other(images).any()


def test_features_without_sizes_are_refused_where_they_would_be_weighed_wrongly(build: Build, images: Tensor) -> None:
    model = patch(build(global_pool="avg"), r=4)
    with pytest.raises(ValueError, match="weighs 25 tokens by their sizes"):
        model.forward_head(model.forward_features(images))
    by_class = patch(build(), r=4)
    torch.testing.assert_close(by_class.forward_head(by_class.forward_features(images)), by_class(images))


def test_patching_again_sets_r_alone(build: Build, images: Tensor) -> None:
    model = patch(build(), r=4)
    before = model(images)
    assert patch(model, r=0) is model and model.r == 0
    assert torch.equal(patch(model, r=4)(images), before)


@pytest.mark.parametrize("r", [-1, [1, 1, 1, 1]])
def test_a_model_that_is_refused_stays_as_it_was(build: Build, r: Any) -> None:
    model = build()
    with pytest.raises(ValueError):
        patch(model, r=r)
    assert type(model) is VisionTransformer and "_merged" not in model.__dict__
    with pytest.raises(UnsupportedModelError, match="a Linear; supported timm classes"):
        patch(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="a PatchedVisionTransformer; .* it merges already, by its r"):
        wrap(patch(model))


@pytest.mark.usefixtures("fresh_dynamo")
def test_it_compiles_whole(build: Build, images: Tensor) -> None:
    model: Any = patch(build(), r=4)
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for r in (4, 0, [5, 0, 2]):
        model.r = r
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
