"""Nothing is sent, and nothing is written outside of the state folder and the temporary one, whatever is run.

An audit hook in every process notes each look-up, connection and opened file, with an empty home and `CI` unset.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.audited import audited, noted
from tests.e2e.service import Service
from tests.server.model_folders import random_vit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "server/static/samples"
PHOTO = str(SAMPLES / "lighthouse.jpg")
CALIBRATE = "calibrate --r 4 --limit 4 --threads 1 --max-batch-size 2 --output out/curve.json --plot out/curve.svg"
COMPILE = """
import tempfile
from pathlib import Path
import torch
from server.device.models import load_model
from server.device.openvino_compiler import Compiler
from server.settings import Settings
from tome_core.quiet import openvino

if __name__ == "__main__":  # the translation imports this file too
    merged = load_model(Settings().specs()[0]).merged
    Compiler(merged, (64, 64), 1, Path("out")).graph((4,) * merged.num_blocks, 1, "fp32", aside=True)
    openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
"""


def run(folder: Path, *command: str) -> None:
    """Runs Python in a folder, and says what was sent or written where nothing should be."""
    (folder / "out").mkdir(exist_ok=True)
    process = subprocess.run(
        [sys.executable, *command], cwd=folder, env=audited(folder), capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    check(folder)


def check(folder: Path) -> None:
    hosts, files = noted(folder)
    assert {each for each in hosts if each not in ("127.0.0.1", "localhost")} == set()
    ours = (f"{folder}/state/", f"{folder}/tmp/", f"{folder}/out/", "/dev/")
    assert [each for each in files if not f"{each}/".startswith(ours)] == []
    assert list((folder / "home").iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["classify", PHOTO],
        ["explain", PHOTO, "--output", "out/merged.png"],
        ["models"],
        ["export", "--r", "4", "--output", "out/model.onnx"],
        [*CALIBRATE.split(), "--backend", "openvino", "--images", str(SAMPLES)],
    ],
    ids=lambda command: command[0],
)
def test_a_command_sends_nothing_and_writes_nothing_elsewhere(command: list[str], tmp_path: Path) -> None:
    if command[0] in ("export", "calibrate"):  # which take long for the bundled model
        command = [*command, "--model", f"local-dir:{random_vit(tmp_path / 'model')}"]
    run(tmp_path, "-m", "server.cli", *command)


def test_tuning_does_neither(tmp_path: Path) -> None:
    photos = tmp_path / "out/photos"
    for number in range(13):  # it takes 50 photos or more
        shutil.copytree(SAMPLES, photos / str(number))
    run(tmp_path, *"-m server.cli tune --minutes 0.01 --band 8..8".split(), "--images", str(photos), "-o", "out/tuned")


def test_openvino_sends_nothing_in_our_processes_its_converter_and_the_translation_included(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    script = tmp_path / "compile_aside.py"
    script.write_text(COMPILE)
    run(tmp_path, str(script))
    assert any(each.startswith(f"{tmp_path}/out/") for each in noted(tmp_path)[1])


def test_the_hook_notes_what_openvino_does_by_itself(tmp_path: Path) -> None:
    """So that the tests here can fail. The look-up is refused: no test sends anything."""
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    with pytest.raises(AssertionError):
        run(tmp_path, "-c", "import openvino")


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_a_server_sends_nothing_and_writes_nothing_elsewhere(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="the package openvino is not installed")
    environment = audited(tmp_path)
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    service = Service("--backend", backend, "--max-batch-size", "1", state_dir=tmp_path / "state", preloaded=False)
    try:
        service.wait_until_ready()
        bench = ["bench", "--url", service.url, "--images", str(SAMPLES), "--duration", "1", "--warmup", "0"]
        load = ["--r", "3", "--concurrency", "1"]
        process = subprocess.run([sys.executable, "-m", "server.cli", *bench, *load], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    finally:
        assert service.stop() == 0
    check(tmp_path)
