"""What the fused loop must notice: layers that compute something else, hooks, training, and inputs that are wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tome_core
from benchmarks.coverage import randomise
from tome_core import FixedR, Recorded, UnsupportedModelError, wrap

Build = Callable[..., Any]
HALF = (0.5, 0.5, 0.5)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 4, 5])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "naflexvit_base_patch16_gap"])
def test_images_of_other_channels_are_refused(build: Build, name: str, channels: int) -> None:
    model: Any = build(name) if "naflex" not in name else timm.create_model(name, depth=1, embed_dim=48, num_heads=3)
    fused = wrap(model.eval(), "fused")
    with pytest.raises((RuntimeError, ValueError)):
        fused(torch.randn(2, channels, 96, 96), 2)
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
        fused.from_pixels(HALF, HALF)(torch.zeros(2, 96, 96, channels, dtype=torch.uint8), 2)


@torch.no_grad()
def test_pixels_are_bytes(build: Build) -> None:
    seeing = wrap(build(), "fused").from_pixels(HALF, HALF)
    for pixels in (torch.rand(2, 96, 96, 3), torch.zeros(2, 96, 96, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="they must be torch.uint8"):
            seeing(pixels, 2)
    with pytest.raises(ValueError, match="mean has 1 channels, std 3"):
        wrap(build()).from_pixels((0.5,), HALF)


class Shifted(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@torch.no_grad()
def test_a_norm_of_another_class_is_not_read_as_a_norm(build: Build) -> None:
    model = build()
    model.blocks[1].norm2.__class__ = Shifted
    with pytest.raises(UnsupportedModelError, match="has a Shifted, not LayerNorm"):
        wrap(model, "fused")
    model, images = build(), torch.randn(2, 3, 96, 96)
    model.norm.__class__ = Shifted  # the last norm is called, not read
    torch.testing.assert_close(wrap(model, "fused")(images, 5), wrap(model, "plain")(images, 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", ["ls1", "ls2"])
def test_a_scale_of_another_class_is_named(build: Build, half: str) -> None:
    model = build()
    setattr(model.blocks[1], half, nn.Tanh())
    with pytest.raises(UnsupportedModelError, match="block 1 has a Tanh, not LayerScale"):
        wrap(model, "fused")


@torch.no_grad()
@pytest.mark.parametrize("where", ["patch_embed", "patch_embed.proj", "norm", "norm_pre", "blocks.1.mlp.act"])
def test_a_hook_on_a_layer_that_would_not_run_is_heard(build: Build, where: str) -> None:
    model, calls = build(), []
    fused = wrap(model, "fused")
    model.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    assert "hooks" in fused.implementation(torch.randn(1, 3, 96, 96)).reason
    fused(torch.randn(2, 3, 96, 96), 5)
    assert calls


@torch.no_grad()
def test_layers_that_train_run_as_they_are(build: Build) -> None:
    fused, images = wrap(build(proj_drop_rate=0.5, pos_drop_rate=0.5), "fused"), torch.randn(2, 3, 96, 96)
    for layer in fused.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    assert "training" in fused.implementation(images).reason
    assert not torch.equal(fused(images, 2), fused(images, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_any_batch_exports(build: Build, name: str) -> None:
    fused = wrap(build(name), "fused")
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(FixedR(fused, 2), (torch.randn(3, 3, 96, 96),), dynamic_shapes=dynamic)
    images = torch.randn(7, 3, 96, 96)
    torch.testing.assert_close(program.module()(images), fused(images, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224"])
def test_fake_tensors_leave_nothing_behind(build: Build, name: str) -> None:
    seeing = wrap(build(name, depth=1), "fused").from_pixels((0.4, 0.5, 0.6), HALF)
    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        seeing(mode.from_tensor(pixels), 2)
    assert type(seeing(pixels, 2)) is Tensor


@torch.no_grad()
def test_beit_with_one_bias_for_all_blocks() -> None:
    model: Any = timm.create_model(
        "beit_base_patch16_224", img_size=64, depth=3, embed_dim=48, num_heads=3, num_classes=5,
        use_rel_pos_bias=False, use_shared_rel_pos_bias=True,
    ).eval()  # fmt: skip
    randomise(model)
    images = torch.randn(2, 3, 64, 64)
    plain, fused = wrap(model, "plain"), wrap(model, "fused")
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-4)
    for r in (0, 3):
        torch.testing.assert_close(fused(images, r), plain(images, r), rtol=1e-4, atol=1e-4)


def test_a_twin_has_hooks_and_layers_of_its_own(build: Build) -> None:
    merged, calls = wrap(build()), []
    twin = merged.from_pixels(HALF, HALF)
    twin.register_forward_hook(lambda *_: calls.append(1))
    merged(torch.randn(1, 3, 96, 96))
    assert not calls and twin.model is merged.model
    twin.model = build(num_classes=7)
    assert merged.model.num_classes == 10


@torch.no_grad()
def test_recordings_do_not_travel(build: Build) -> None:
    fast, images = Recorded(wrap(build()), 5), torch.randn(2, 3, 96, 96)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(images), fast(images))


def narrow(**overrides: Any) -> Any:
    model = timm.create_model(
        "vit_small_patch16_224", img_size=64, depth=3, embed_dim=384, num_heads=6, num_classes=5, **overrides
    )
    randomise(model)
    return model.eval().bfloat16()


@torch.no_grad()
def test_float8_where_the_second_product_is_too_short() -> None:
    model, images = narrow(mlp_ratio=0.5), torch.randn(2, 3, 64, 64).bfloat16()
    fused = tome_core.wrap(model, "fused")
    got, wanted = fused.in_float8()(images, 2).float(), fused(images, 2).float()
    assert 0 < (got - wanted).norm() < 0.1 * wanted.norm()


@torch.no_grad()
def test_float8_of_weights_that_are_zero_or_no_numbers() -> None:
    model, images = narrow(), torch.randn(2, 3, 64, 64).bfloat16()
    for parameter in (*model.blocks[1].mlp.fc1.parameters(), *model.blocks[2].norm2.parameters()):
        parameter.zero_()
    assert tome_core.wrap(model, "fused").in_float8()(images, 2).isfinite().all()
    model.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="not finite"):
        tome_core.wrap(model, "fused").in_float8()
