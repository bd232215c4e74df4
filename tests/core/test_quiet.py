"""Packages that report to their makers are imported where they are kept from it, and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORTING = ("openvino", "onnxruntime", "openvino_telemetry")
BEHIND_QUIET = {"openvino.frontend.pytorch", "openvino.frontend.pytorch.fx_decoder"}
"""What `to_openvino` imports of openvino, once it has that from `quiet`."""


def imports(file: Path) -> list[str]:
    """Modules that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(str(node.module))
    return names


@pytest.mark.parametrize("room", ["server", "tome_core", "benchmarks", "training"])
def test_no_code_imports_them_past_quiet(room: str) -> None:
    files = [file for file in (ROOT / room).rglob("*.py") if file != ROOT / "tome_core/quiet.py"]
    assert len(files) > 2
    past = {name for file in files for name in imports(file) if name.partition(".")[0] in REPORTING}
    assert past <= (BEHIND_QUIET if room == "tome_core" else set())


def test_quiet_alone_imports_none_of_them() -> None:
    program = "import sys, tome_core.quiet; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"openvino", "onnxruntime", "torch"} & set(loaded.stdout.split())


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_package_that_is_missing_is_missing_here_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tome_core import quiet

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        getattr(quiet, name)
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        getattr(quiet, "loud")  # noqa: B009  # mypy knows that there is none
