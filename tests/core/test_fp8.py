"""Blocks in float8, on the CPU by plain PyTorch: close to what they were, never beyond the range, refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.activations import GELUTanh
from timm.layers.mlp import SwiGLU
from torch import Tensor, nn

import tome_core
from tome_core import UnsupportedModelError, fp8
from tome_core.fp8 import LARGEST
from tome_core.kernels import FLOAT8, Norm, reference

Build = Callable[..., Any]

WIDE: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", WIDE),
    "LayerScale": ("deit3_small_patch16_224", WIDE),
    "no class token": ("vit_base_patch16_siglip_224", WIDE),
    "one product in each block": ("vit_tiny_patch16_224", {"embed_dim": 192, "num_heads": 3}),
    "BEiT, with biases apart": ("beit_base_patch16_224", WIDE),
    "rotary": ("vit_small_patch16_dinov3", WIDE),
    "tanh": ("vit_tiny_patch16_224", WIDE | {"act_layer": GELUTanh}),
    "a norm at the end": ("vit_tiny_patch16_224", WIDE | {"global_pool": "avg", "final_norm": True}),
}


@torch.inference_mode()
@pytest.mark.parametrize(("name", "overrides"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_close_to_half_precision(build: Build, name: str, overrides: dict[str, Any], dtype: torch.dtype) -> None:
    merged = tome_core.wrap(build(name, **overrides).to(dtype), "fused")
    in_float8, images = merged.in_float8(), torch.randn(2, 3, 96, 96).to(dtype)
    assert in_float8.implementation(images).name == "fused"
    for r in (0, 3, 99):
        wanted, got = merged(images, r), in_float8(images, r)
        assert got.dtype == dtype and got.isfinite().all()
        assert not torch.equal(got, wanted)
        assert r == 99 or apart(got, wanted) < 0.1  # beyond, other pairs may merge


@torch.inference_mode()
def test_pixels_in_float8(build: Build) -> None:
    merged = tome_core.wrap(build(**WIDE).bfloat16(), "fused")
    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    wanted = merged.from_pixels((0.5,) * 3, (0.25,) * 3)(pixels, 3)
    for made in (merged.in_float8().from_pixels, lambda *a: merged.from_pixels(*a).in_float8()):
        assert 0 < apart(made((0.5,) * 3, (0.25,) * 3)(pixels, 3), wanted) < 0.1


@torch.inference_mode()
def test_weights_are_those_of_the_moment(build: Build) -> None:
    model, images = build(**WIDE).bfloat16(), torch.randn(2, 3, 96, 96).bfloat16()
    merged = tome_core.wrap(model, "fused")
    in_float8 = merged.in_float8()
    before = in_float8(images)
    for block in model.blocks:
        block.mlp.fc1.weight.zero_()
    assert torch.equal(merged.in_float8()(images), merged.in_float8()(images))
    assert apart(merged.in_float8()(images), merged(images)) < 0.1
    assert apart(in_float8(images), merged(images)) > apart(in_float8(images), before)


@torch.inference_mode()
def test_the_first_block_stays_as_it_is(build: Build) -> None:
    merged = tome_core.wrap(build(**WIDE, depth=1).bfloat16(), "fused")
    images = torch.randn(2, 3, 96, 96).bfloat16()
    assert torch.equal(merged.in_float8()(images, 3), merged(images, 3))


def test_weights_fill_the_range(build: Build) -> None:
    model = build(**WIDE).bfloat16()
    blocks = fp8.quantise(tome_core.wrap(model, "fused").family, model)
    assert blocks[0] is None and len(blocks) == 3
    for i, block in enumerate(blocks[1:], 1):
        assert block is not None
        for product, layer in zip(block, ("attn.qkv", "mlp.fc1", "mlp.fc2"), strict=True):
            assert product is not None
            weight = model.blocks[i].get_submodule(layer).weight.float()
            assert product.weight.dtype == FLOAT8 and product.weight.float().abs().max() == LARGEST
            torch.testing.assert_close(product.scales[0] * product.scales[1], torch.tensor(product.factor))
            back = product.weight.float() * product.scales[1]
            assert ((back - weight).abs() <= weight.abs() / 16 + weight.abs().max() / LARGEST / 2**9).all()


@st.composite
def norms(draw: st.DrawFn) -> tuple[Norm, Tensor]:
    """A norm, and tokens: common ones, and such that one channel, or a pattern, has all."""
    C, centred, biased = draw(st.sampled_from([2, 16, 384])), draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(C, generator=generator) * 10 ** draw(st.floats(-2, 2))
    bias = torch.randn(C, generator=generator) * 10 ** draw(st.floats(-2, 2)) if biased and centred else None
    x = torch.randn(1, 8, C, generator=generator) * 10 ** draw(st.floats(-3, 3))
    x[0, 0] = 0
    x[0, 1, 1:] = 0  # nothing is larger
    x[0, 2] = weight.sign()
    x[0, 3] = torch.tensor([1.0, -1.0]).repeat(C // 2)
    return Norm(weight, bias, 1e-6, centred), x


@given(norms())
def test_a_norm_stays_within_its_bound(case: tuple[Norm, Tensor]) -> None:
    norm, x = case
    multiplier = LARGEST / fp8._largest(norm)
    scaled = reference.norm(x, None, norm, torch.float32, multiplier)
    assert scaled.abs().max() <= LARGEST * (1 + 1e-5)
    assert reference.norm(x, None, norm, FLOAT8, multiplier).float().isfinite().all()


def test_the_bound_of_a_norm_is_no_wider_than_it_must_be() -> None:
    x = torch.zeros(1, 1, 400)
    x[..., 7] = 1e4
    norm = Norm(torch.ones(400), None, 1e-6)
    assert reference.norm(x, None, norm, torch.float32, LARGEST / fp8._largest(norm)).max() > 0.99 * LARGEST


@given(norms(), st.integers(0, 2**32), st.floats(-2, 2))
def test_a_product_of_a_norm_stays_within_its_bound(case: tuple[Norm, Tensor], seed: int, scale: float) -> None:
    norm, x = case
    torch.manual_seed(seed)
    linear = nn.Linear(x.shape[2], 16)
    with torch.no_grad():
        linear.weight.mul_(10**scale)
        linear.weight[0] = norm.weight.sign()  # as the third token is
        x[0, 4] = linear.weight[1] * norm.weight  # which the second output is the largest for
        bound = fp8._largest_output(norm, linear)
        hidden = linear(reference.norm(x, None, norm, torch.float32, 1.0))
        assert hidden.abs().max() <= bound * (1 + 1e-4)
        assert nn.functional.gelu(hidden).abs().max() <= bound * (1 + 1e-4)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vit_tiny_patch16_224", WIDE | {"mlp_layer": SwiGLU}, "SwiGLU that is not two products"),
    ("vit_tiny_patch16_224", WIDE | {"act_layer": nn.ReLU}, "not two products with GELU between them"),
    ("vit_tiny_patch16_224", WIDE | {"scale_mlp_norm": True}, "not two products with GELU between them"),
    ("vit_tiny_patch16_224", {}, r"inputs; float8 takes multiples of 16 from 384 on"),
    ("vit_tiny_patch16_224", {"embed_dim": 392, "num_heads": 7}, r"\(392, 1568\) inputs; float8 takes multiples of 16"),
    ("eva02_base_patch14_224", WIDE | {"img_size": 84}, "no joint projection|not two products"),
    ("vit_tiny_patch16_224", WIDE | {"attn_layer": "diff"}, "DiffAttention"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_cannot_be_multiplied_so_is_refused(
    build: Build, monkeypatch: pytest.MonkeyPatch, name: str, overrides: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(fp8, "missing_on", lambda device: None)
    merged = tome_core.wrap(build(name, **overrides).bfloat16())
    with pytest.raises(UnsupportedModelError, match=f"in float8: .*({message})"):
        merged.in_float8()


def test_how_it_was_wrapped_may_stand_against_it(build: Build) -> None:
    model = build(**WIDE).bfloat16()
    for kernels, message in (("auto", "there (is|are) no .* (on|for) cpu"), ("plain", "asked for plain")):
        with pytest.raises(UnsupportedModelError, match=message):
            tome_core.wrap(model, kernels).in_float8()  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="its dtype is torch.float32; it must be bfloat16 or float16"):
        tome_core.wrap(build(**WIDE), "fused").in_float8()


def test_old_gpus_have_no_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "kernels_missing_on", lambda device: None)
    for capability, missing in (((8, 9), True), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (fp8.missing_on(torch.device("cuda")) is not None) == missing
