"""What a compiled schedule takes of the memory, in a process of its own: no more than the bound counts; given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says it"),
]

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
import torch
from server.device.models import load_model
from server.device.openvino_compiler import Compiler
from server.device.openvino_graphs import FEWER_BATCH_SIZES

SIZES = FEWER_BATCH_SIZES["fp32"]
from server.settings import Settings

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

if __name__ == "__main__":
    torch.set_num_threads(2)
    merged = load_model(Settings().specs()[0]).merged
    compiler = Compiler(merged, (64, 64), 2, Path(sys.argv[1]))
    runs, taken = [], []
    for r in (1, 2, 3):
        runs.append(compiler.any_batch((r,) * merged.num_blocks, 32, "fp32", SIZES, aside=True))
        runs[-1](torch.zeros(32, 3, 64, 64))
        taken.append(anonymous())
    assert len(runs[-1].graphs) == 1 + len(SIZES)
    del runs[1:]
    print(len(SIZES) + 1, compiler.graph_bytes, *taken, anonymous())
"""


def test_a_schedule_takes_no_more_than_is_counted_and_gives_it_back(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "cache")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    graphs, graph_bytes, first, *_, last, after = map(int, process.stdout.split())
    assert graphs * graph_bytes < last - first < 2 * graphs * graph_bytes  # of two schedules after the first
    assert after - first < (last - first) / 3
