"""What each room of the service loads: HTTP and the commands never torch, and what lies between HTTP and it neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = {"torch", "timm", "torchvision", "triton", "safetensors", "numpy", "openvino"}
HTTP = {"fastapi", "starlette", "uvicorn", "httpx", "httptools", "server.api", "server.client"}
LIST = "import sys, importlib; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sorted(sys.modules))"


def loaded_by(*modules: str) -> set[str]:
    """All modules that importing some loads, in a fresh interpreter."""
    command = [sys.executable, "-c", LIST, *modules]
    loaded = set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())
    assert loaded >= set(modules)
    return loaded


def room(name: str) -> list[str]:
    """The modules of a package of the server."""
    found = [f"server.{name}.{file.stem}" for file in sorted((ROOT / "server" / name).glob("*.py"))]
    return [each.removesuffix(".__init__") for each in found]


COMMANDS = ["server.cli", "server.supervisor", "server.bench.session", "server.bench.rate", "server.images.photos"]


@pytest.mark.parametrize("modules", [room("api"), COMMANDS], ids=["api", "commands"])
def test_the_http_side_and_the_command_load_neither_torch_nor_timm(modules: list[str]) -> None:
    """So that they start at once and weigh little."""
    assert not loaded_by(*modules) & (TORCH | {"httpx"})


@pytest.mark.parametrize("modules", [room("ipc"), room("batching")], ids=["ipc", "batching"])
def test_what_lies_between_http_and_the_device_loads_neither_nor_what_decodes(modules: list[str]) -> None:
    assert len(modules) > 5
    assert not loaded_by(*modules) & (TORCH | HTTP | {"PIL"})


def test_what_decodes_on_the_http_side_loads_neither_torch_nor_http() -> None:
    loaded = loaded_by("server.images.image", "server.images.jpeg", "server.images.pillow")
    assert not loaded & (TORCH | HTTP)
    assert "PIL" not in loaded_by("server.images.image", "server.images.jpeg")


def test_a_process_that_reads_files_loads_neither_torch_nor_http() -> None:
    assert not loaded_by("server.offline.reader") & (TORCH | HTTP)


def test_messages_are_words_alone() -> None:
    """Who speaks to an engine need not be a server."""
    assert not loaded_by("server.ipc.messages") & {"prometheus_client", "asyncio", "server.ipc.frames", "PIL"}


def test_the_client_loads_neither_the_server_nor_what_makes_pixels() -> None:
    loaded = loaded_by("server.client")
    assert "httpx" in loaded
    assert not loaded & {"torch", "timm", "numpy", "PIL", "fastapi", "starlette", "prometheus_client", "server.api"}


def test_the_batcher_loads_neither_http_nor_torch_nor_what_batches_are_of() -> None:
    loaded = loaded_by("server.batching.batcher")
    assert not loaded & {*TORCH, *HTTP, "pydantic", "prometheus_client", "server.ipc", "server.images"}


def test_the_core_knows_nothing_of_the_server() -> None:
    loaded = loaded_by("tome_core.vit")
    assert "torch" in loaded  # the check can fail
    assert not {name for name in loaded if name.partition(".")[0] in ("server", "fastapi", "prometheus_client")}
