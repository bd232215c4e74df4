"""`tome-server models --supported` lists names and loads nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from tome_core import list_models


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("server.device.models.load_model", lambda *_: pytest.fail("loads a model"))
    monkeypatch.setattr("server.cli.keep_caches_in", lambda folder: None)
    monkeypatch.chdir(tmp_path)


def test_every_name_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--supported"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_models()
    assert {len(line.split()) for line in lines} == {2}


@pytest.mark.parametrize("pattern", ["dinov3", "vit_small_*dinov3"])
def test_a_pattern_narrows_them(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--supported", pattern, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == list_models(pattern)
    assert {"name": "vit_small_patch16_dinov3", "class": "Eva"} in rows


def test_no_such_name_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--supported", "swin"]) != 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"none of the {len(list_models())} supported models of timm has a name like 'swin'" in shown.err


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = "import sys; from server.cli import main; main([*sys.argv[1:]]); assert 'torch' not in sys.modules"
    environment = {"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    options: Any = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code, "models", "--supported", "dinov3"], **options)
    assert done.returncode == 0, done.stderr
    assert "vit_small_patch16_dinov3" in done.stdout
