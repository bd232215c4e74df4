"""The faces under test: a good request to each of their routes, and what their errors say."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx

from tests.server.conftest import Service, grey_png

PROTOCOLS = ("embeddings", "huggingface", "torchserve", "kserve", "sagemaker", "vertex")
PNG = grey_png(100)
B64 = base64.b64encode(PNG).decode()

RAW: dict[str, Any] = {"content": PNG}
INPUT: dict[str, Any] = {"json": {"input": B64}}
INPUTS: dict[str, Any] = {"json": {"inputs": B64}}
INSTANCES: dict[str, Any] = {"json": {"instances": [{"b64": B64}]}}

ASKED: dict[str, dict[tuple[str, str], dict[str, Any]]] = {
    "embeddings": {("POST", "/v1/embeddings"): INPUT},
    "huggingface": {("POST", "/"): RAW, ("POST", "/models/{name}"): INPUTS},
    "torchserve": {
        ("POST", "/predictions/{name}"): RAW,
        ("PUT", "/predictions/{name}"): RAW,
        ("POST", "/predictions/{name}/{version}"): INSTANCES,
        ("PUT", "/predictions/{name}/{version}"): RAW,
    },
    "kserve": {("POST", "/v1/models/{name}:predict"): INSTANCES},
    "sagemaker": {("POST", "/invocations"): RAW, ("POST", "/endpoints/{name}/invocations"): INPUTS},
    "vertex": {("POST", "/predict"): INSTANCES},
}
"""A good request for images, for each route of each face."""

CHECKS: dict[str, tuple[str, ...]] = {"torchserve": ("/ping",), "vertex": ("/health",)}
"""The routes that say whether a server is ready, of the faces that have some."""

SAID: dict[str, Callable[[Any], str]] = {
    "embeddings": lambda body: body["error"]["message"],
    "huggingface": lambda body: body["error"],
    "torchserve": lambda body: body["message"],
    "kserve": lambda body: body["error"],
    "sagemaker": lambda body: body["message"],
    "vertex": lambda body: body["error"]["message"],
}
"""Where an error of each face says what is wrong."""

EVERY = [(face, method, path) for face, routes in ASKED.items() for method, path in routes]


def url_of(path: str) -> str:
    return path.replace("{name}", "tiny").replace("{version}", "1")


async def ask(service: Service, face: str, method: str, path: str, **said: Any) -> httpx.Response:
    """The good request to a route, with changes."""
    return await service.client.request(method, url_of(path), **{**ASKED[face][method, path], **said})


def message_of(response: httpx.Response, face: str) -> str:
    """What an error says, in the shape of its face."""
    message = SAID[face](response.json())
    assert isinstance(message, str) and message
    return message
