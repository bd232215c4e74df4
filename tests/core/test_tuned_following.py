"""Models of tuned numbers follow the one that they were made of: its mode, place, matrices, hooks, copies, threads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor

from tests.core.tuned_numbers import having, numbers
from tome_core import MergedViT, vit, wrap

Build = Callable[..., Any]


@pytest.fixture
def model(build: Build) -> Any:
    return build("vit_medium_patch16_gap_240", drop_path_rate=0.3)


@pytest.fixture
def merged(model: Any) -> MergedViT:
    merged = wrap(model)
    merged.take_tuned(numbers(merged))
    return merged


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 96, 96)


def reference(merged: MergedViT, band: int = 0) -> MergedViT:
    """The model with a band's numbers as its own, made anew of how it is now."""
    assert merged.tuned is not None
    return wrap(having(merged.model, merged.tuned.bands[band].tensors))


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_matrices_that_change_in_place(merged: MergedViT, model: Any, images: Tensor) -> None:
    before = merged(images, 3)
    for name in ("blocks.1.mlp.fc1.weight", "patch_embed.proj.weight", "head.weight"):
        model.get_parameter(name).mul_(1.5)
    model.load_state_dict({"blocks.0.attn.qkv.weight": torch.randn(144, 48) / 7}, strict=False)
    assert not torch.allclose(merged(images, 3), before, atol=1e-3)
    same(merged(images, 3), reference(merged)(images, 3))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_timm_model_that_is_brought_to_another_dtype(
    merged: MergedViT, model: Any, images: Tensor, dtype: torch.dtype
) -> None:
    first = merged(images, 3)
    model.to(dtype)
    assert merged(images.to(dtype), 3).dtype == dtype
    same(merged(images.to(dtype), 3), reference(merged)(images.to(dtype), 3))
    model.float()
    torch.testing.assert_close(merged(images, 3), first, rtol=0.1, atol=0.1)  # what bfloat16 has rounded stays so


@torch.no_grad()
def test_a_norm_that_stays_in_float32_has_float32_numbers(merged: MergedViT, model: Any) -> None:
    model.bfloat16()
    model.norm.float()
    model.blocks[1].norm2.float()
    twin: Any = merged.at(3).model
    assert twin.blocks[1].norm2.weight.dtype == torch.float32 and twin.blocks[0].norm2.weight.dtype == torch.bfloat16


def test_the_mode_of_the_model_and_of_each_layer(merged: MergedViT, model: Any, images: Tensor) -> None:
    def drops() -> bool:
        return not torch.equal(merged(images, 3), merged(images, 3))

    eval_model = merged.at(3)
    assert merged.at(3) is eval_model and not drops()
    model.train()
    twin: Any = merged.at(3).model
    assert twin.training and twin.blocks[0].training and drops()
    model.eval()
    assert not drops() and not merged.at(3).has_training_layers()
    for layer in model.modules():
        layer.train(isinstance(layer, DropPath))
    assert drops() and merged.at(3).has_training_layers()


def test_gradient_checkpointing(merged: MergedViT, model: Any, images: Tensor, monkeypatch: Any) -> None:
    calls: list[int] = []

    def checkpoint(function: Any, *args: Any, use_reentrant: bool) -> Any:
        calls.append(1)
        return function(*args)

    monkeypatch.setattr(vit, "checkpoint", checkpoint)
    plain = merged(images, 3)
    model.set_grad_checkpointing(True)
    same(merged(images, 3), plain)
    assert len(calls) == 3
    model.set_grad_checkpointing(False)
    merged(images, 3)
    assert len(calls) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.1.norm1", "blocks.1.attn.qkv", "blocks.2.mlp.act", "patch_embed", "norm"])
def test_hooks_that_come_later(build: Build, images: Tensor, name: str) -> None:
    model = build()
    calls: list[Any] = []
    merged = wrap(model, "fused")
    merged.take_tuned(numbers(merged))
    before = merged(images, 3)

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return 0 * output

    handle = model.get_submodule(name).register_forward_hook(hook)
    assert not torch.allclose(merged(images, 3), before) and calls
    assert merged.at(3).implementation(images).reason == "a layer has hooks"
    handle.remove()
    assert torch.equal(merged(images, 3), before)


def test_backward_hooks_that_come_later(merged: MergedViT, model: Any, images: Tensor) -> None:
    merged(images, 3)
    seen: list[tuple[str, Tensor]] = []
    for layer in ("blocks.1.norm1", "blocks.1.mlp.act", "blocks.1.mlp.fc2"):
        model.get_submodule(layer).register_full_backward_hook(
            lambda module, grad_input, grad_output, layer=layer: seen.append((layer, grad_output[0]))
        )
        model.get_submodule(layer).register_full_backward_pre_hook(
            lambda module, grad_output, layer=layer: seen.append((layer, grad_output[0]))
        )
    merged(images, 3).sum().backward()
    assert [layer for layer, _ in seen[::2]] == ["blocks.1.mlp.fc2", "blocks.1.mlp.act", "blocks.1.norm1"]
    assert all(gradient.any() for _, gradient in seen) and len(seen) == 6


def test_gradients_reach_matrices_and_leave_tuned_numbers(build: Build, images: Tensor) -> None:
    model = build(drop_path_rate=0.1).train()
    merged = wrap(model)
    merged.take_tuned(tuned := numbers(merged))
    torch.manual_seed(2)
    merged(images, 3).square().sum().backward()
    other = having(build(drop_path_rate=0.1), tuned.bands[0].tensors).train()
    torch.manual_seed(2)
    wrap(other)(images, 3).square().sum().backward()
    theirs, still = dict(other.named_parameters()), tuned.bands[0].tensors
    for name, parameter in model.named_parameters():
        if name in still:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)


def test_what_was_made_in_inference_mode_takes_gradients_later(merged: MergedViT, images: Tensor) -> None:
    with torch.inference_mode():
        wanted = merged(images, 3)
    images.requires_grad_()
    got = merged(images, 3)
    got.sum().backward()
    assert torch.equal(got, wanted) and images.grad is not None


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda merged: pickle.loads(pickle.dumps(merged))])
@torch.no_grad()
def test_copies_stand_on_their_own(merged: MergedViT, images: Tensor, made_before: bool, duplicate: Any) -> None:
    if made_before:
        merged.at(3)
    other = duplicate(merged)
    wanted, small = merged(images, 3), merged(images, 2)
    for parameter in merged.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(other(images, 3), wanted) and torch.equal(other(images, 2), small)
    assert not torch.equal(merged(images, 3), wanted)
    own: Any = other.model
    twin: Any = other.at(3).model
    assert twin.blocks[0].attn.qkv.weight is own.blocks[0].attn.qkv.weight


def test_twins_made_afterwards_have_them_and_those_made_before_do_not(build: Build, images: Tensor) -> None:
    merged = wrap(build(), "fused")
    before = merged.plain()
    tuned = numbers(merged)
    merged.take_tuned(tuned)
    with torch.no_grad():
        wanted, untuned = wrap(having(merged.model, tuned.bands[1].tensors))(images, 8), before(images, 8)
        assert not torch.allclose(untuned, wanted, atol=1e-2)
        torch.testing.assert_close(merged.plain()(images, 8), wanted, rtol=1e-4, atol=1e-4)
        pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
        of_pixels = merged.from_pixels((0.5,) * 3, (0.25,) * 3)
        for twin in (of_pixels, of_pixels.plain()):
            got = twin(pixels, 8)
            torch.testing.assert_close(got, merged(of_pixels.normalised(pixels), 8), rtol=1e-4, atol=1e-4)
        merged.take_tuned(None)
        assert torch.equal(merged.plain()(images, 8), untuned)
        assert torch.equal(of_pixels.plain()(pixels, 8), got)


def test_threads_that_ask_for_different_r_at_once(build: Build, images: Tensor) -> None:
    rs = [0, 3, 4, 5, 7, 8, 9, 10] * 3
    with torch.inference_mode():
        first = wrap(build())
        first.take_tuned(numbers(first))
        wanted = [first(images, r) for r in rs]
    for _ in range(5):
        merged = wrap(build())
        merged = merged.take_tuned(numbers(merged)).plain()  # which has made none of its models yet

        @torch.inference_mode()
        def answer(r: int, merged: MergedViT = merged) -> Tensor:
            return merged(images, r)  # type: ignore[no-any-return]

        with ThreadPoolExecutor(8) as pool:
            for got, expected in zip(pool.map(answer, rs), wanted, strict=True):
                same(got, expected)
