"""The forward loop by fused operations: what the plain one computes, told when and why, compiled and exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

import tome_core
from tome_core import FixedR, kernels

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("deit3_small_patch16_224", {}),  # LayerScale, no position for the class token
    ("vit_small_patch14_reg4_dinov2", {"img_size": 84}),  # registers
    ("vit_base_patch16_siglip_224", {"global_pool": "avg"}),  # no class token
    ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # the norm comes after pooling
    ("vit_tiny_patch16_224", {"qkv_bias": False}),
]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("name", "overrides"), MODELS)
@pytest.mark.parametrize("r", [0, 1, 5, [0, 9, 3], 99])
def test_equals_the_plain_model(build: Any, name: str, overrides: dict[str, Any], r: Any) -> None:
    model = build(name, **overrides)
    images = torch.randn(3, 3, *model.patch_embed.img_size)
    plain, fused = tome_core.wrap(model, "plain"), tome_core.wrap(model, "fused")
    assert fused.implementation(images).name == "fused" and plain.implementation(images).name == "plain"
    close(fused(images, r), plain(images, r))
    wanted, got = plain.forward_features(images, r), fused.forward_features(images, r)
    close(got.x, wanted.x)
    assert (got.size is None) == (wanted.size is None)
    if got.size is not None and wanted.size is not None:
        assert torch.equal(got.size, wanted.size)


@torch.inference_mode()
def test_equals_the_plain_model_by_its_kernels(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", "3.7", reason="the interpreter of older Triton does not go with new NumPy")
    monkeypatch.setattr(kernels, "missing_on", lambda device: None)  # Triton's interpreter runs on the CPU
    model = build(depth=2)
    images = torch.randn(2, 3, 96, 96)
    close(tome_core.wrap(model, "fused")(images, 7), tome_core.wrap(model, "plain")(images, 7))


def test_a_gpu_without_a_compiler_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "HAS_COMPILER", False)
    assert "C compiler" in str(kernels.missing_on(torch.device("cuda")))
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert "triton is not installed" in str(kernels.missing_on(torch.device("cuda")))


def test_says_why_it_is_plain(build: Any) -> None:
    images = torch.randn(1, 3, 96, 96)
    merged = tome_core.wrap(build(), "fused")

    def reason() -> str:
        implementation = merged.implementation(images)
        assert implementation.name == "plain"
        return implementation.reason

    assert "gradients" in reason()
    with torch.no_grad():
        assert merged.implementation(images).name == "fused"
        assert "no kernels for cpu" in tome_core.wrap(build()).implementation(images).reason
        assert tome_core.wrap(build(), "plain").implementation(images).reason == "asked for"
        with torch.autocast("cpu"):
            assert "autocast" in reason()
        merged.train()
        assert "training" in reason()
        merged.eval().double()
        assert "float64" in reason()
        merged.float()
        handle = merged.family.blocks(merged.model)[1].register_forward_hook(lambda *_: None)
        assert "hooks" in reason()
        handle.remove()
        assert merged.implementation(images).name == "fused"


@pytest.mark.parametrize(
    ("name", "overrides", "found"),
    [
        ("eva02_tiny_patch14_224", {}, "no plain ViT"),
        ("vit_srelpos_small_patch16_224", {}, "no plain ViT"),
        ("vit_small_patch16_36x1_224", {"block_fn": ParallelThingsBlock}, "is a ParallelThingsBlock"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "is made of DiffAttention and Mlp"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "norms or gates inside"),
        ("vit_tiny_patch16_224", {"num_heads": 4}, "heads of 12"),
        ("vit_tiny_patch16_224", {"act_layer": nn.ReLU}, "ReLU"),
        ("vit_tiny_patch16_224", {"proj_bias": False}, "with a bias"),
    ],
)
def test_what_cannot_run_fused_says_so(build: Any, name: str, overrides: dict[str, Any], found: str) -> None:
    model = build(name, **overrides)
    with pytest.raises(tome_core.UnsupportedModelError, match=found):
        tome_core.wrap(model, "fused")
    with torch.inference_mode():
        images = torch.randn(1, 3, 96, 96)
        assert found in tome_core.wrap(model).implementation(images).reason


@torch.no_grad()
def test_compiles_and_exports_in_one_piece(build: Any) -> None:
    model, images = build(), torch.randn(2, 3, 96, 96)
    fixed = FixedR(tome_core.wrap(model, "fused"), 5)
    wanted = tome_core.wrap(model, "plain")(images, 5)
    close(torch.compile(fixed, fullgraph=True, backend="aot_eager")(images), wanted)
    program = torch.export.export(fixed, (images,))
    close(program.module()(images), wanted)
    assert {"tome.attend.default", "tome.merge_add_norm.default"} <= {str(n.target) for n in program.graph.nodes}
    portable = tome_core.export_program(fixed.merged, 5, (96, 96))
    assert not any("tome" in str(n.target) for n in portable.graph.nodes)  # needs none of this code


def test_operators_are_what_they_say() -> None:
    x, y, weight, size = torch.randn(2, 9, 32), torch.randn(2, 9, 32), torch.randn(32), torch.ones(2, 9)
    groups = kernels.match(kernels.metric(x, 2), 3, 1)
    ops = torch.ops.tome
    torch.library.opcheck(ops.attend.default, (x, y, y, size, 2))
    torch.library.opcheck(ops.metric.default, (x, 2))
    torch.library.opcheck(ops.match.default, (x, 3, 1))
    torch.library.opcheck(ops.add_norm.default, (x, y, None, weight, weight, 1e-6))
    torch.library.opcheck(ops.merge_add_norm.default, (*groups, x, y, size, weight, weight, weight, 1e-6))
