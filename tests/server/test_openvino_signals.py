"""A process in which models came to OpenVINO and went again still receives signals."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, threading
from pathlib import Path

import timm, torch
import tome_core
from server.device.openvino_compiler import Compiler

def compiled():
    compiler = Compiler(merged, (64, 64), 1, Path(sys.argv[1]))
    graph = compiler.graph((3, 0), 1, "fp32")
    graph(torch.zeros(1, 3, 64, 64))
    return [compiler, graph]

facts = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
merged = tome_core.wrap(timm.create_model("vit_tiny_patch16_224", **facts).eval())
first, second = compiled(), compiled()
if sys.argv[2] == "older first":
    first.clear()
    second.clear()
else:
    second.clear()
    dropping = threading.Thread(target=first.clear)
    dropping.start()
    dropping.join()
signal.signal(signal.SIGINT, lambda *args: print("received"))
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("dropped", ["older first", "by another thread"])
def test_a_signal_is_received_after_models_were_dropped(dropped: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tmp_path / "cache"), dropped]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "received\n"), ended.stderr


def test_one_file_makes_a_core() -> None:
    rooms = ("server", "tome_core", "benchmarks", "training", "tests")
    files = [file for room in rooms for file in (ROOT / room).rglob("*.py")]
    makers = [file for file in files if re.search(r"\bCore\(\)", file.read_text())]
    assert makers == [ROOT / "tome_core/openvino_core.py"]
