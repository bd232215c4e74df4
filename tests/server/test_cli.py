"""The `tome-server` command: help, messages instead of tracebacks, `models` and `classify` on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server import __version__
from server.cli import main
from server.settings import Settings
from tests.server.conftest import encode


@pytest.fixture
def photo(tmp_path: Path) -> str:
    file = tmp_path / "photo.png"
    file.write_bytes(encode(Image.new("RGB", (40, 30), (200, 120, 10))))
    return str(file)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("serve", "classify", "explain", "models", "calibrate", "bench"))


@pytest.mark.parametrize("command", ["serve", "classify", "explain", "models", "calibrate", "bench"])
def test_the_help_of_each_command_explains_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    flags = {
        "serve": list(Settings.model_fields),
        "classify": ["model", "weights", "tuned", "r", "device", "precision", "threads", "state_dir"],
        "explain": ["model", "weights", "tuned", "r", "device", "precision", "threads", "state_dir"],
        "models": ["model", "weights", "tuned", "state_dir"],
        "calibrate": ["model", "weights", "device", "precision", "backend", "threads", "max_batch_size", "state_dir"],
        "bench": ["api_key", "api_key_file"],
    }
    for name in [*flags[command], "config"]:
        assert re.search(rf"{flag(name)} (VALUE|FILE)\s+\w+", shown), name


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out.strip()) == (0, __version__)


@pytest.mark.parametrize("said", ["", "dance", "serve --max-batchsize 8", "classify", "serve --port"])
def test_a_wrong_command_line_ends_with_usage(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(said.split())
    assert end.value.code == 2
    assert "usage: tome-server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--port", "eighty"], "port"),
        (["serve", "--r", "fast"], "r is 'fast'"),
        (["serve", "--config", "nothing.yaml"], "nothing.yaml"),
        (["serve", "--model", "a/vit", "--model", "b/vit"], "named alike"),
        (["serve", "--host", "256.256.256.256"], "256.256.256.256"),
        (["models", "--model", "vit_of_nobody"], "vit_of_nobody"),
        (["classify", "--precision", "int3", "photo.png"], "precision"),
        (["classify", "--model", "local-dir:nothing", "photo.png"], "nothing"),
    ],
)
def test_a_bad_setting_is_a_message_and_status_2(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("tome-server: ") and named in shown.err
    assert shown.out == "" and "Traceback" not in shown.err


def _in_channels(config: dict[str, Any]) -> None:
    config.setdefault("model_args", {})["in_chans"] = 1


def _input_size(config: dict[str, Any]) -> None:
    config["pretrained_cfg"]["input_size"] = [3, 0, 64]


def _interpolation(config: dict[str, Any]) -> None:
    config["pretrained_cfg"]["interpolation"] = "area"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_in_channels, "images of 1 channels; they must have 3"),
        (_input_size, "input_size.1: Input should be greater than or equal to 1"),
        (_interpolation, "interpolation: Input should be 'nearest'"),
        (None, "has no model.safetensors"),
    ],
)
def test_a_wrong_model_folder_ends_the_start_before_torch_is_imported(
    change: Callable[[dict[str, Any]], None] | None, said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    if change is not None:
        change(config)
        (tmp_path / "model.safetensors").symlink_to(tiny_folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "torch.py").write_text("raise AssertionError('torch is imported')")
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--state-dir", "none"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    done = subprocess.run(
        [*command, "--model", f"local-dir:{tmp_path}"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tome-server: model ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_an_unknown_variable_is_a_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOME_COLOUR", "red")
    assert main(["models"]) == 2
    assert "colour" in capsys.readouterr().err


def test_models_describes_a_model(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--model", f"local-dir:{tiny_folder}"]) == 0
    shown = capsys.readouterr().out
    assert "tiny-vit: vit_tiny_patch16_224" in shown
    assert "3 classes, 24 features, 32 x 32 px, 2 blocks, r from 0 to 8" in shown
    assert "17 at r=0, 9 at r=4, 5 at r=8" in shown


def test_models_describes_several_as_json(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"local-dir:{tiny_folder}"
    assert main(["models", "--json", "--model", source, "--model", f"{source},name=other"]) == 0
    one, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["name"], other["name"], one["num_classes"], one["max_r"]) == ("tiny-vit", "other", 3, 8)
    assert one["tokens_left"] == {"0": 17, "4": 9, "8": 5}


def test_classify_names_what_is_in_each_photo(
    tiny_folder: Path, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--model", f"local-dir:{tiny_folder}", "--top-k", "2", photo, photo]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[:3] == lines[3:]
    assert lines[0] == photo
    assert all(re.fullmatch(r" +\d+\.\d%  (cat|dog|goldfish)", line) for line in lines[1:3])


def test_classify_names_all_classes_of_a_model_that_has_few(
    tiny_folder: Path, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "--model", f"local-dir:{tiny_folder}", photo]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3


def test_classify_as_json_uses_r(tiny_folder: Path, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {}
    for r in ("0", "8,2"):
        arguments = ["classify", "--json", "--top-k", "3", "--r", r, "--model", f"local-dir:{tiny_folder}", photo]
        assert main(arguments) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["file"], answer["model"]) == (photo, "tiny-vit")
        assert {each["label"]: each["index"] for each in answer["top_k"]} == {"cat": 0, "dog": 1, "goldfish": 2}
        assert sum(each["score"] for each in answer["top_k"]) == pytest.approx(1, abs=1e-5)
        scores[r] = answer["r"]
    assert scores == {"0": [0, 0], "8,2": [8, 2]}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--top-k", "0"], "between 1 and 3"),
        (["--top-k", "4"], "between 1 and 3"),
        (["--r", "9"], "between 0 and 8"),
        (["--r", "1,1,1"], "2"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cpu,cpu"], "'tome-server serve' takes several"),
        (["missing.png"], "missing.png"),
        (["."], "."),
        (["broken.png"], "broken.png"),
    ],
)
def test_classify_says_what_is_wrong(
    arguments: list[str],
    named: str,
    tiny_folder: Path,
    photo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(Path(photo).read_bytes()[:60])
    photos = [] if len(arguments) == 1 else [photo]
    assert main(["classify", "--model", f"local-dir:{tiny_folder}", "--top-k", "1", *arguments, *photos]) == 2
    assert named in capsys.readouterr().err
