"""What an HTTP process or the command loads: never torch, so that it starts at once and weighs little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ["server.api.app", "server.api.process", "server.cli", "server.supervisor", "server.ipc.transport"]
LIGHT += ["server.bench.session", "server.bench.rate", "server.images.photos"]
LIST = "import sys, importlib; importlib.import_module(sys.argv[1]); print(*sorted(sys.modules))"


def loaded_by(module: str) -> set[str]:
    """All modules that importing one loads, in a fresh interpreter."""
    command = [sys.executable, "-c", LIST, module]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_the_http_side_and_the_command_load_neither_torch_nor_timm(module: str) -> None:
    loaded = loaded_by(module)
    assert module in loaded
    assert not loaded & {"torch", "timm", "torchvision", "safetensors", "numpy", "httpx"}


def test_the_client_loads_neither_the_server_nor_what_makes_pixels() -> None:
    loaded = loaded_by("server.client")
    assert "httpx" in loaded
    assert not loaded & {"torch", "timm", "numpy", "PIL", "fastapi", "starlette", "prometheus_client", "server.api"}


@pytest.mark.parametrize("module", ["server.batching.batcher"])
def test_the_batcher_loads_neither_http_nor_torch(module: str) -> None:
    assert not loaded_by(module) & {"torch", "fastapi", "starlette", "pydantic", "prometheus_client", "server.api"}


def test_the_core_knows_nothing_of_the_server() -> None:
    loaded = loaded_by("tome_core.vit")
    assert "torch" in loaded  # the check can fail
    assert not {name for name in loaded if name.partition(".")[0] in ("server", "fastapi", "prometheus_client")}
