"""What OpenVINO computes of a model at one `r`, against torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import tome_core
from tome_core.schedule import RLike

pytest.importorskip("openvino", reason="the package openvino is not installed")

from tome_core.openvino import save, to_openvino  # needs the package
from tome_core.openvino_core import add_operator, core
from tome_core.openvino_operator import build_operator, to_bfloat16

SCHEDULES: dict[str, RLike] = {"none": 0, "list": (5, 2, 3), "more than there are": 99}


def tiny(name: str = "vit_tiny_patch16_224", **changes: Any) -> tome_core.MergedViT:
    """A small model with random weights that spread its tokens, so that rounding decides no match."""
    torch.manual_seed(0)
    facts: dict[str, Any] = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 7, **changes}
    model = timm.create_model(name, **facts).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.1)
    return tome_core.wrap(model)


@pytest.fixture(scope="module", params=["own operators", "compiled"])
def operator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Merging by OpenVINO's own operators, and by ours."""
    if request.param == "own operators":
        return None
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    return build_operator(tmp_path_factory.mktemp("operator"))


def compiled(
    merged: tome_core.MergedViT, r: RLike, file: Path, batch_size: int, operator: Path | None, precision: str = "f32"
) -> Any:
    """The model as OpenVINO runs it."""
    save(to_openvino(merged, r, (64, 64), operator), file)
    if operator is not None:
        add_operator(operator)
    model = core().read_model(file)
    model.reshape([batch_size, 3, 64, 64])
    if precision == "bf16":
        to_bfloat16(model)
    return core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})


def images(batch_size: int) -> Tensor:
    return torch.randn(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SCHEDULES)
@torch.inference_mode()
def test_openvino_gives_the_logits_of_torch(name: str, operator: Path | None, tmp_path: Path) -> None:
    merged = tiny()
    for batch_size in (1, 3):
        run = compiled(merged, SCHEDULES[name], tmp_path / f"{batch_size}.xml", batch_size, operator)
        wanted = merged(images(batch_size), SCHEDULES[name])
        torch.testing.assert_close(torch.from_numpy(run(images(batch_size).numpy())[0]), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}),
        ("eva02_tiny_patch14_224", {"patch_size": 16}),
    ],
)
@torch.inference_mode()
def test_so_it_does_for_other_kinds_of_models(
    name: str, changes: dict[str, Any], operator: Path | None, tmp_path: Path
) -> None:
    merged = tiny(name, **changes)
    run = compiled(merged, 3, tmp_path / "model.xml", 2, operator)
    torch.testing.assert_close(torch.from_numpy(run(images(2).numpy())[0]), merged(images(2), 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"num_classes": 0}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
@torch.inference_mode()
def test_features_come_beside_the_logits(
    name: str, changes: dict[str, Any], operator: Path | None, tmp_path: Path
) -> None:
    both = tiny(name, **changes).with_features()
    run = compiled(both, (5, 2, 3), tmp_path / "model.xml", 2, operator)
    outputs = torch.from_numpy(run(images(2).numpy())[0])
    assert outputs.shape == (2, changes.get("num_classes", 7) + 48)
    torch.testing.assert_close(outputs, both(images(2), (5, 2, 3)), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_equal_tokens_merge_as_in_torch(operator: Path | None, tmp_path: Path) -> None:
    merged = tiny(class_token=False, global_pool="avg", pos_embed="none", num_classes=5)
    run = compiled(merged, (3, 2, 99), tmp_path / "model.xml", 2, operator)
    grey = torch.full((2, 3, 64, 64), 0.5)
    grey[:, :, :16, :32] = -0.5  # two tokens of one kind, fourteen of another: nearly every proposal is a tie
    torch.testing.assert_close(torch.from_numpy(run(grey.numpy())[0]), merged(grey, (3, 2, 99)), atol=1e-4, rtol=1e-4)


def test_scores_and_sizes_stay_float32_in_a_bfloat16_model(operator: Path | None, tmp_path: Path) -> None:
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    run = compiled(tiny(), 2, tmp_path / "model.xml", 2, operator, "bf16")
    layers: dict[str, set[str]] = {}
    for node in run.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        layers.setdefault(facts["layerType"].astype(str), set()).add(facts["outputPrecisions"].astype(str))
    assert "bf16" in layers["FullyConnected"]
    if operator is not None:
        tokens_and_sizes = {precisions.partition(",") for precisions in layers["Reference"]}
        assert {(tokens, *sizes.split(",")[:1]) for tokens, _, sizes in tokens_and_sizes} == {("bf16", "f32")}
        return
    assert {precisions.partition(",")[0] for precisions in layers["TopK"]} == {"f32", "i32"}
    assert layers["MatMul"] == {"f32", "bf16"}  # similarities, and the weighted means


def test_a_model_in_training_mode_is_refused() -> None:
    merged = tiny()
    merged.model.train()
    with pytest.raises(tome_core.ExportError, match="training mode"):
        to_openvino(merged, 2, (64, 64))
