"""The `tome-server` command: help, messages instead of tracebacks, `models` and `classify` on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from PIL import Image

from server import __version__
from server.cli import COMMANDS, main
from server.errors import SettingsError
from server.offline import devices
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
        "classify": ["model", "weights", "tuned", "r", "device", "precision", "backend", "decode", "max_batch_size"],
        "explain": ["model", "weights", "tuned", "r", "device", "precision", "threads", "state_dir"],
        "models": ["model", "weights", "tuned", "state_dir"],
        "calibrate": ["model", "weights", "device", "precision", "backend", "threads", "max_batch_size", "state_dir"],
        "bench": ["api_key", "api_key_file"],
    }
    for name in [*flags[command], "config"]:
        assert re.search(rf"{flag(name)} (VALUE|FILE|{{[\w,]+}})\s+\w+", shown), name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_lists_the_choices_of_its_flags(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    kinds = {name: Settings.model_fields[name].annotation for name in COMMANDS[command].SETTINGS}
    listed = {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}
    listed |= {name: ("true", "false") for name, kind in kinds.items() if kind is bool}
    for name, choices in listed.items():
        assert f"{flag(name)} {{{','.join(choices)}}}" in shown, name


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
        (["models", "--model", "local-dir:nothing"], "nothing"),
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


def test_an_answer_that_nobody_reads_to_its_end_is_no_fault(photo: str, tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "classify", "--json", "--model", f"local-dir:{tiny_folder}", photo]
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


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
    assert scores == {"0": 0, "8,2": [8, 2]}


def test_classify_takes_folders_and_goes_on_after_a_broken_file(
    tiny_folder: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    names = ["0.png", "1.png", "2.png", "below/3.png"]
    for name in names:
        (folder / name).write_bytes(Path(photo).read_bytes())
    (folder / "1.png").write_bytes(Path(photo).read_bytes()[:60])
    (folder / "notes.txt").write_text("no photo")
    flags = ["--model", f"local-dir:{tiny_folder}", "--max-batch-size", "2", "--backend", "torch"]
    assert main(["classify", "--json", *flags, str(folder), photo]) == 1
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [each["file"] for each in answers] == [*(str(folder / name) for name in names), photo]
    assert ["decoded" in (each["error"] or "") for each in answers] == [False, True, False, False, False]
    assert [len(each["top_k"]) for each in answers] == [3, 0, 3, 3, 3]
    assert shown.err == "1 of 5 files have an error\n"
    assert main(["classify", *flags, str(folder)]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3 * 4 and f"{folder}/1.png: " in shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["photo.png", "missing.png"], "missing.png: No such file or directory"),
        (["photo.png", "empty"], "empty holds no images"),
        (["photo.png", "--r", "auto"], "--r is auto"),
    ],
)
def test_classify_checks_its_files_before_a_model_loads(
    arguments: list[str],
    named: str,
    photo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    monkeypatch.setattr(devices, "open_devices", lambda settings: pytest.fail("a model loads"))
    assert main(["classify", *arguments]) != 0
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "count", "backend"),
    [([], 2, "torch"), ([], 3, "auto"), (["--backend", "openvino"], 1, "openvino")],
    ids=["what fits into a batch", "more", "named"],
)
def test_classify_computes_by_the_backend_of_serve_once_there_is_more_than_a_batch(
    flags: list[str],
    count: int,
    backend: str,
    photo: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Settings] = []

    def open_devices(settings: Settings) -> None:
        asked.append(settings)
        raise SettingsError("seen")

    monkeypatch.setattr(devices, "open_devices", open_devices)
    assert main(["classify", "--max-batch-size", "2", *flags, *[photo] * count]) != 0
    assert [settings.backend for settings in asked] == [backend]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--top-k", "0"], "between 1 and 3"),
        (["--top-k", "4"], "between 1 and 3"),
        (["--r", "9"], "between 0 and 8"),
        (["--r", "1,1,1"], "2"),
        (["--device", "abacus"], "abacus"),
        (["broken.png"], "broken.png: the image cannot be decoded"),
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
    assert main(["classify", "--model", f"local-dir:{tiny_folder}", "--top-k", "1", *arguments, *photos]) == (
        2 if photos else 1
    )
    assert named in capsys.readouterr().err
