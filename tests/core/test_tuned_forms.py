"""Tuned numbers in every form that a model takes: fixed, recorded, compiled, exported, in OpenVINO, in float8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.core.recording import Calls
from tests.core.tuned_numbers import having, numbers
from tome_core import FixedR, MergedViT, Ramp, Recorded, export_onnx, export_program, fp8, wrap
from tome_core.schedule import RLike

Build = Callable[..., Any]

RS: list[RLike] = [3, [9], Ramp(8), 5]
SIZE = (96, 96)
WIDE: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}


@pytest.fixture
def merged(build: Build) -> MergedViT:
    """All tokens are pooled, so that the last norm counts."""
    merged = wrap(build("vit_medium_patch16_gap_240", depth=2))
    merged.take_tuned(numbers(merged))
    return merged


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, *SIZE)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("r", RS)
@torch.no_grad()
def test_fixed(merged: MergedViT, images: Tensor, r: RLike) -> None:
    fixed = FixedR(merged, r)
    assert torch.equal(fixed(images), merged(images, r))
    merged.take_tuned(None)
    assert torch.equal(fixed(images), merged(images, r))


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("r", RS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_whole(merged: MergedViT, images: Tensor, r: RLike, inference: bool) -> None:
    compiled = torch.compile(FixedR(merged, r), fullgraph=True, backend="eager")
    with torch.inference_mode(inference):
        torch.testing.assert_close(compiled(images), merged(images, r))
        torch.testing.assert_close(compiled(images[:1]), merged(images[:1], r))


@torch.inference_mode()
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_whole_after_what_came_later(merged: MergedViT, images: Tensor) -> None:
    tuned = merged.tuned
    fixed = FixedR(merged.take_tuned(None), 3)
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")
    untuned = compiled(images)
    merged.take_tuned(tuned)
    torch.testing.assert_close(compiled(images), merged(images, 3))
    assert not torch.allclose(compiled(images), untuned, atol=1e-2)
    merged.double().at(3)
    torch.testing.assert_close(compiled(images.double()), merged(images.double(), 3))


@torch.no_grad()
def test_recorded_anew_when_numbers_were_loaded(merged: MergedViT, images: Tensor, recorder: Calls) -> None:
    fast, wanted = Recorded(merged, 3), merged(images, 3)
    for _ in range(2):
        torch.testing.assert_close(fast(images), wanted)
    assert len(recorder.shapes) == 1
    tuned = merged.tuned
    merged.take_tuned(None)
    torch.testing.assert_close(fast(images), merged(images, 3))
    assert not torch.allclose(fast(images), wanted, atol=1e-2) and len(recorder.shapes) == 2
    merged.take_tuned(tuned)
    torch.testing.assert_close(fast(images), wanted)


@pytest.mark.parametrize("r", RS)
@torch.no_grad()
def test_program(merged: MergedViT, images: Tensor, r: RLike) -> None:
    program = export_program(merged, r, SIZE).module()
    torch.testing.assert_close(program(images), merged(images, r))


@torch.no_grad()
def test_onnx(merged: MergedViT, images: Tensor, tmp_path: Path) -> None:
    written = export_onnx(merged, 3, SIZE, tmp_path / "model.onnx")
    assert written.difference is not None and written.difference < 1e-3
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(got, merged(images, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_openvino(build: Build, images: Tensor, tmp_path: Path, name: str) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    from tome_core.openvino import save, to_openvino
    from tome_core.openvino_core import core

    merged = wrap(build(name, patch_size=16))
    merged.take_tuned(numbers(merged))
    save(to_openvino(merged, 3, SIZE, None), tmp_path / "model.xml")
    run = core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = torch.from_numpy(run(images.numpy())[0])
    torch.testing.assert_close(got, merged(images, 3), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_float8_shares_its_matrices(build: Build, images: Tensor) -> None:
    model, images = build(**WIDE), images.bfloat16()
    merged = wrap(model, "fused")
    tuned = numbers(merged)
    merged.to(torch.bfloat16)
    in_float8 = merged.take_tuned(tuned).in_float8()
    for r, band in ((3, tuned.bands[0]), (8, tuned.bands[1])):
        other = wrap(having(model, band.tensors), "fused").in_float8()
        torch.testing.assert_close(in_float8(images, r), other(images, r), rtol=0.02, atol=0.02)
        for own, twin, alone in zip(in_float8._float8, in_float8.at(r)._float8, other._float8, strict=True):
            assert (own is None) == (twin is None) == (alone is None)
            for one, two, three in zip(own or (), twin or (), alone or (), strict=True):
                assert one and two and three and one.weight.data_ptr() == two.weight.data_ptr()
                assert torch.equal(two.weight.view(torch.uint8), three.weight.view(torch.uint8))
                assert one.multiplier != two.multiplier == three.multiplier
                torch.testing.assert_close(two.factor, three.factor, rtol=1e-12, atol=0)


@torch.inference_mode()
def test_shared_float8_matrices_keep_their_scale_when_weights_change(build: Build) -> None:
    merged = wrap(build(**WIDE).bfloat16(), "fused")
    before, model = merged.in_float8(), merged.model
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.mul_(4)
    for own, alike in zip(before._float8, fp8.quantise(merged.family, model, like=before._float8), strict=True):
        for one, two in zip(own or (), alike or (), strict=True):
            assert one and two and two.weight is one.weight
            torch.testing.assert_close(two.factor * two.multiplier, one.factor * one.multiplier, rtol=1e-12, atol=0)
            torch.testing.assert_close(two.scales[1], one.scales[1], rtol=1e-6, atol=0)
