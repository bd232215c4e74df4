"""The published implementation's numbers: merges, schedules, and the logits of a real ViT-Ti on real photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from tome_core import MergedViT, Ramp, match, merge, track_source, wrap
from tome_core.schedule import resolve

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "golden" / "tome_reference.json"
WEIGHTS = SHARED / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"{GOLDEN.name} is not beside the checkout")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(json.loads(GOLDEN.read_text()))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def vit_tiny() -> MergedViT:
    if not WEIGHTS.exists():
        pytest.skip(f"{WEIGHTS.name} is not beside the checkout")
    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(WEIGHTS))
    return wrap(model)


def as_sets(rows: list[Tensor]) -> list[Tensor]:
    """Merged rows sorted by the first token that each holds; the last tensor says which tokens it holds."""
    order = rows[-1].argmax(dim=-1).argsort(dim=1)
    return [torch.stack([t[b, first] for b, first in enumerate(order)]) for t in rows]


@pytest.mark.parametrize("number", range(8))
def test_merges_are_the_published_ones(golden: dict[str, Any], tensors: dict[str, Tensor], number: int) -> None:
    case = golden["cases"][number]
    metric, x, size, *expected = (
        tensors[f"case{number}.{name}"] for name in ("metric", "x", "size", "merged", "merged_size", "source")
    )
    plan = match(metric, case["r"], case["class_token"] + case["distill_token"])
    merged, merged_size = merge(plan, x, size[..., 0])
    held = torch.nn.functional.one_hot(track_source(plan), case["tokens_out"]).transpose(1, 2).float()
    ours = [merged, merged_size[..., None], held]
    if not case["class_token"]:  # there the published code leaves rows in no meaningful order
        ours, expected = as_sets(ours), as_sets(expected)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-6)
    assert torch.equal(ours[1], expected[1])
    assert torch.equal(ours[2], expected[2])


@pytest.mark.parametrize("number", range(6))
def test_schedules_are_the_published_ones(golden: dict[str, Any], number: int) -> None:
    schedule = golden["schedules"][number]
    r = schedule["r"]
    if isinstance(r, list) and isinstance(r[1], float):
        r = Ramp(r[0], r[1], "published")
    assert list(resolve(r, schedule["num_layers"])) == schedule["per_layer"]


def test_no_case_is_left_out(golden: dict[str, Any]) -> None:
    assert (len(golden["cases"]), len(golden["schedules"]), golden["vit_tiny"]["r"]) == (8, 6, [0, 8, 13, 16])


@pytest.mark.parametrize("r", [0, 8, 13, 16])
@torch.inference_mode()
def test_logits_are_the_published_ones(vit_tiny: MergedViT, tensors: dict[str, Tensor], r: int) -> None:
    images = (tensors["vit_tiny.pixels_uint8"].float() / 255 - 0.5) / 0.5
    expected = tensors[f"vit_tiny.logits_r{r}"]
    assert (vit_tiny(images, r) - expected).abs().max() <= 1e-5 * expected.abs().max()
