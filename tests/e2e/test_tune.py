"""`tome-server tune` as a process: Ctrl-C keeps what was learned, the same command goes on, `serve` finds the file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.client import Client
from tests.e2e.service import StartService
from tests.server.model_folders import noise_photos, random_vit

pytestmark = pytest.mark.slow

# How much these photos gain is not what this test is about.
PROGRAM = """
import sys
from server.cli import main
from server.tuning.judging import Gain
Gain.is_sure = True
sys.exit(main())
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "tune", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """The last line of its answer, and the rest of what it told."""
    answer, told = process.communicate()
    assert process.returncode == 0, told
    last: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return last, told


def test_ctrl_c_the_same_command_again_and_then_serve(start_service: StartService, tmp_path: Path) -> None:
    folder, photos = random_vit(tmp_path / "tiny vit"), noise_photos(tmp_path / "photos", 50)
    command = ["--model", f"local-dir:{folder}", "--images", str(photos), "--band", "20..22", "--minutes", "0.1"]
    command += ["--device", "cpu", "--threads", "1", "--state-dir", str(tmp_path / "state")]

    process = started(*command)
    assert process.stderr is not None
    assert any(line.startswith("[") for line in process.stderr), "it ended before it told its progress"
    process.send_signal(signal.SIGINT)
    first, told = ended(process)
    assert "stopping after this step" in told and "stopped; the same command goes on from here" in told
    file = folder / "model.tuned.safetensors"
    assert first["written"] == str(file) and file.is_file()

    second, told = ended(started(*command))
    assert f"going on after step {first['steps']}\n" in told and "stopped" not in told
    assert second["steps"] > first["steps"] and second["written"] == str(file)
    assert not list((tmp_path / "state").rglob("*.unfinished"))

    service = start_service("--model", f"local-dir:{folder}")
    with Client(service.url) as client:
        answers = [client.classify((photos / "0.png").read_bytes(), r=r) for r in (0, 19, 20, 22)]
        assert [answer.tuned for answer in answers] == [False, False, True, True]
    service.stop()
