"""One translation for every schedule that merges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import tome_core

pytest.importorskip("openvino", reason="the package openvino is not installed")

from tome_core.openvino import save, to_openvino  # needs the package
from tome_core.openvino_core import add_operator, core
from tome_core.openvino_operator import build_operator, operators
from tome_core.openvino_schedules import name_no_tokens, set_schedule

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")

SIDE, DEPTH = 64, 3


@pytest.fixture(scope="module", params=["token", "avg"])
def translated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model whose answer is its class token's or the mean of its tokens, and its translation."""
    folder = tmp_path_factory.mktemp("translated")
    operator = build_operator(folder)
    add_operator(operator)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, depth=DEPTH, num_classes=5, global_pool=request.param
    )
    merged = tome_core.wrap(model.eval())
    graph = to_openvino(merged, 1, (SIDE, SIDE), operator)
    name_no_tokens(graph)
    save(graph, folder / "merging.xml")
    return merged, folder / "merging.xml"


@torch.inference_mode()
@pytest.mark.parametrize("schedule", [(1, 1, 1), (4, 4, 4), (8, 0, 0), (0, 3, 0), (0, 0, 2), (16, 16, 16), (5, 2, 1)])
def test_a_graph_merges_by_the_schedule_that_is_set(translated: tuple[Any, Path], schedule: tuple[int, ...]) -> None:
    merged, file = translated
    graph = core().read_model(file)
    set_schedule(graph, schedule)
    graph.reshape([2, 3, SIDE, SIDE])
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    answers = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([images.numpy()])
    torch.testing.assert_close(torch.from_numpy(answers[0]), merged(images, schedule), atol=1e-4, rtol=1e-4)


def test_a_schedule_of_another_length_is_refused(translated: tuple[Any, Path]) -> None:
    graph = core().read_model(translated[1])
    assert len(operators(graph)) in (DEPTH - 1, DEPTH)
    with pytest.raises(RuntimeError, match="merging operators, and the model 7 blocks"):
        set_schedule(graph, (1,) * 7)
