"""`tome-server export`: a file that any runtime can use by itself, and messages instead of tracebacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from server import __version__
from server.cli import main
from server.device.models import load_model
from server.model_spec import ModelSpec


def export(tiny_folder: Path, output: Path, *arguments: str) -> int:
    return main(["export", "--model", f"local-dir:{tiny_folder}", "-o", str(output), *arguments])


def told_by(file: Path) -> dict[str, Any]:
    told = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    return {name: json.loads(value) for name, value in told.items()}


def test_the_file_answers_as_the_model_and_describes_itself(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.onnx"
    assert export(tiny_folder, file, "--r", "4") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{file}: vit_tiny_patch16_224, {file.stat().st_size / 1e6:.1f} MB, opset 20"
    assert shown[1:3] == ["  images (batch, 3, 32, 32) to logits (batch, 3)", "  tokens: 17 come in, 9 are left"]
    assert shown[3].startswith("  largest difference from torch: ") and len(shown) == 4

    merged = load_model(ModelSpec.model_validate(f"local-dir:{tiny_folder}")).merged
    images = torch.randn(3, 3, 32, 32)
    (logits,) = onnxruntime.InferenceSession(file).run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), merged(images, 4), rtol=1e-4, atol=1e-4)
    assert told_by(file) == {
        "name": "tiny-vit",
        "architecture": "vit_tiny_patch16_224",
        "schedule": [4, 4],
        "token_counts": [17, 13, 9],
        "tuned": False,
        "input_size": [32, 32],
        "resize_size": [35, 35],
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "labels": ["cat", "dog", "goldfish"],
        "version": __version__,
    }


@pytest.mark.parametrize(
    ("arguments", "schedule", "tokens"),
    [
        (["--r", "6,2"], [6, 2], [17, 11, 9]),
        (["--r", "3", "--inflect", "-1"], [6, 0], [17, 11, 11]),
        (["--config", "config.yaml"], [1, 1], [17, 16, 15]),
    ],
)
def test_r_is_a_list_a_ramp_or_a_setting(
    arguments: list[str],
    schedule: list[int],
    tokens: list[int],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("r: 1\n")
    assert export(tiny_folder, tmp_path / "tiny.onnx", *arguments) == 0
    told = told_by(tmp_path / "tiny.onnx")
    assert (told["schedule"], told["token_counts"]) == (schedule, tokens)


def test_another_opset_and_no_runtime_to_compare_with(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(tiny_folder, tmp_path / "tiny.onnx", "--opset", "18") == 0
    shown = capsys.readouterr().out
    assert ", opset 18\n" in shown and "not compared with torch: onnxruntime is not installed" in shown
    assert onnx.load(tmp_path / "tiny.onnx").opset_import[0].version == 18


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--r", "9"], "between 0 and 8"),
        (["--r", "1,1,1"], "this model has 2"),
        (["--r", "3", "--inflect", "2"], "inflect is 2"),
        (["--r", "3,1", "--inflect", "-1"], "beside a single r"),
        (["--opset", "9"], "between 18 and 22"),
        (["-o", "missing/tiny.onnx"], "there is no folder missing"),
        (["-o", "."], "-o is ., which is a folder"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(
    arguments: list[str],
    named: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(tiny_folder, Path("tiny.onnx"), *arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("tome-server: ") and named in shown.err
    assert shown.out == "" and list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_onnx_file_is_not_overwritten(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tiny_folder / "model.safetensors"
    before = weights.read_bytes()
    assert export(tiny_folder, weights) == 2
    assert f"-o is {weights}, which is no .onnx file; it is not overwritten" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_a_missing_package_is_named_with_its_extra(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(tiny_folder, tmp_path / "tiny.onnx") == 2
    assert "pip install 'tome-server[export]'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_message(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", full)
    assert export(tiny_folder, tmp_path / "tiny.onnx") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "--r", "8"])
    assert end.value.code == 2
    assert "-o/--output" in capsys.readouterr().err


def test_the_help_explains_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        flag in shown for flag in ("--model", "--weights", "--r", "--config", "--inflect", "--opset", "--output")
    )
