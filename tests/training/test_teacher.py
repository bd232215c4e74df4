"""The teacher: how it starts, how it is fitted, and what it says of the student's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.data.imagenet_info import ImageNetInfo

from tests.training.conftest import DataSet, said_by
from training import teacher
from training.data import Labels
from training.teacher import Teacher, enlarge, from_imagenet


@pytest.fixture
def imagenet_weights(small_models: None, tmp_path: Path) -> Path:
    whole: Any = timm.create_model(teacher.ARCHITECTURE, **teacher.MODEL_ARGS)
    for parameter in whole.head.parameters():
        torch.nn.init.normal_(parameter)
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_it_starts_as_the_imagenet_model_cut_to_our_classes(imagenet_weights: Path) -> None:
    rows = [999, 0, 517, 3]
    wnids = [ImageNetInfo().label_names()[row] for row in rows]
    whole: Any = timm.create_model(teacher.ARCHITECTURE, **teacher.MODEL_ARGS).eval()
    whole.load_state_dict(load_file(imagenet_weights))
    cut: Any = from_imagenet(imagenet_weights, Labels(wnids, wnids)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(cut(x), whole(x)[:, rows])


def test_it_answers_for_the_enlarged_image_and_learns_nothing(teacher_weights: Path) -> None:
    model: Any = timm.create_model(teacher.ARCHITECTURE, num_classes=200, **teacher.MODEL_ARGS).eval()
    model.load_state_dict(load_file(teacher_weights))
    says = Teacher(teacher_weights, 200, torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64)
    logits, features = says(images)
    assert says.width == 24 and features.shape == (2, 24)
    assert not logits.requires_grad and not features.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(F.interpolate(images, size=32, mode="bicubic")))
        torch.testing.assert_close(model.head(features), logits)


def test_fitting_learns_the_labels_and_ends_with_its_top1(
    imagenet_weights: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", data.folder, "--weights", imagenet_weights, "--batch-size", 6, "--lr", 0.02]
    known = []
    for epochs in (1, 40):
        out = tmp_path / f"{epochs}.safetensors"
        said = said_by(monkeypatch, teacher.main, *arguments, "--out", out, "--epochs", epochs)
        assert [line.split(" loss ")[0] for line in said[:-1]] == [
            f"teacher epoch {epoch + 1}/{epochs}" for epoch in range(epochs)
        ]
        assert {weight.dtype for weight in load_file(out).values()} == {torch.float16}
        fitted: Any = timm.create_model(teacher.ARCHITECTURE, num_classes=200, **teacher.MODEL_ARGS).eval()
        fitted.load_state_dict(load_file(out))
        with torch.inference_mode():
            guesses = fitted(enlarge(data.val.images.float() / 127.5 - 1)).argmax(1)
            known.append(fitted(enlarge(data.train.images.float() / 127.5 - 1)).softmax(1))
        assert said[-1] == f"teacher top-1 {(guesses == data.val.labels).float().mean():.4f}"
    before, after = (probabilities[torch.arange(6), data.train.labels].mean() for probabilities in known)
    assert after > 5 * before
