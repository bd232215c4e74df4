"""Whole models by the Triton kernels against the plain loop: each kind of position, on whatever device there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tome_core
from tests.core.operands import DEVICE
from tome_core.kernels import FLOAT8, attention
from tome_core.kernels.launch import Kernel

Build = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("by_kernels")

NAMES = ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"]


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_model(build: Build, name: str) -> None:
    model = build(name, depth=2).to(DEVICE)
    plain, fused = tome_core.wrap(model, "plain"), tome_core.wrap(model, "fused")
    images = torch.randn(2, 3, 96, 96).to(DEVICE)
    for r in (0, 4):
        torch.testing.assert_close(fused(images, r), plain(images, r), rtol=1e-3, atol=1e-3)
    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8).to(DEVICE)
    plain, fused = (merged.from_pixels((0.5,) * 3, (0.25,) * 3) for merged in (plain, fused))
    torch.testing.assert_close(fused(pixels), plain(pixels), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES[:1] + NAMES[2:])
def test_half_precision_stays_close(build: Build, name: str) -> None:
    images = torch.randn(2, 3, 96, 96).to(DEVICE)
    wanted = tome_core.wrap(build(name, depth=2).to(DEVICE), "plain")(images)
    fused = tome_core.wrap(build(name, depth=2).to(DEVICE, torch.bfloat16), "fused")
    got = fused(images.bfloat16())
    assert (got.float() - wanted).norm() < 0.05 * wanted.norm()
    assert fused(images.bfloat16(), 4).isfinite().all()


@pytest.mark.gpu
@torch.inference_mode()
def test_float8_stays_close(build: Build) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("only Hopper and newer multiply in float8")
    merged = tome_core.wrap(build(embed_dim=384, num_heads=6).to(DEVICE, torch.bfloat16))
    images = torch.randn(8, 3, 96, 96).to(DEVICE, torch.bfloat16)
    in_float8 = merged.in_float8()
    assert any(block and block.fc1 and block.fc1.weight.dtype == FLOAT8 for block in in_float8._float8)
    for r in (0, 3):
        wanted, got = merged(images, r).float(), in_float8(images, r).float()
        assert 0 < (got - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.gpu
@torch.inference_mode()
def test_auto_runs_the_kernels(build: Build) -> None:
    merged, images = tome_core.wrap(build(depth=2).to(DEVICE)), torch.randn(1, 3, 96, 96).to(DEVICE)
    assert merged.implementation(images).name == "fused"
    merged(images, 4)
    assert attention._launch.compiled


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_r_and_no_batch_waits_for_a_compiler(
    build: Build, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """What is compiled into a kernel follows from the model alone, where tokens fill the same tiles."""
    merged = tome_core.wrap(build(name, depth=2).to(DEVICE, dtype), "fused")
    images, launch, compiled = torch.randn(3, 3, 96, 96).to(DEVICE, dtype), Kernel.__call__, set()

    def noting(self: Kernel, grid: Any, tensors: Any, numbers: Any, constants: Any, *args: Any, **kwargs: Any) -> None:
        compiled.add((self, *(None if t is None else t.dtype for t in tensors), *constants))
        launch(self, grid, tensors, numbers, constants, *args, **kwargs)

    monkeypatch.setattr(Kernel, "__call__", noting)
    merged(images, 2)
    known = len(compiled)
    for r in (1, 3):
        merged(images[:1], r)
    assert 0 < known == len(compiled)
