"""Other servers with the same model, and two programs that bound ours: their commands and requests."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from server.bench.load import Request

PYTHON = sys.executable
IMAGE = {"content-type": "image/jpeg"}
JSON = {"content-type": "application/json"}
FASTAPI = (PYTHON, "-m", "benchmarks.peers.fastapi_app")
FREE = (PYTHON, "-m", "benchmarks.peers.free_app")
SMALL = 32  # pixels: the free model's input, so that decoding costs next to nothing


@dataclass(frozen=True)
class Peer:
    """Another server.

    Attributes:
        module: Its module, which must be installed.
        install: Its name for pip.
        command: Its program.
        path: Its endpoint.
        in_json: Whether it takes images as base64 in JSON.
    """

    module: str
    install: str
    command: tuple[str, ...]
    path: str
    in_json: bool = False

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module.partition(".")[0]) is not None

    @property
    def headers(self) -> Mapping[str, str]:
        return JSON if self.in_json else IMAGE

    def requests(self, photos: Sequence[bytes]) -> list[Request]:
        if not self.in_json:
            return [Request(self.path, photo) for photo in photos]
        return [Request(self.path, json.dumps({"image": base64.b64encode(p).decode()}).encode()) for p in photos]


PEERS = {
    "litserve": Peer("litserve", "litserve", (PYTHON, "-m", "benchmarks.peers.litserve_app"), "/predict", True),
    "bentoml": Peer(
        "bentoml",
        "bentoml",
        (PYTHON, "-m", "bentoml", "serve", "benchmarks.peers.bentoml_app:Front", "--host", "127.0.0.1")
        + ("--port", "{port}"),
        "/classify",
    ),
    "ray": Peer("ray.serve", "'ray[serve]'", (PYTHON, "-m", "benchmarks.peers.ray_app"), "/"),
    "mosec": Peer(
        "mosec",
        "mosec",
        (PYTHON, "-m", "benchmarks.peers.mosec_app", "--port", "{port}", "--address", "127.0.0.1")
        + ("--timeout", "60000", "--log-level", "warning"),
        "/inference",
    ),
}


def small(photo: bytes) -> bytes:
    """A photo of the free model's input size."""
    encoded = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("RGB").resize((SMALL, SMALL)).save(encoded, "JPEG")
    return encoded.getvalue()
