"""Clients of a running service, good ones and bad ones."""

from __future__ import annotations

import io
import socket

import httpx
from PIL import Image

from tests.e2e.service import Service

DEADLY_GREY = 77
"""A wholly grey image that ends an engine of `faulty.py`."""


def png(grey: int) -> bytes:
    """An image that is grey on the left and black on the right; 255 makes it wholly white."""
    image = Image.new("L", (64, 64), grey)
    if grey < 255:
        image.paste(0, (32, 0, 64, 64))
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def _flat(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


DEADLY = _flat(DEADLY_GREY)


def classify(service: Service, photo: bytes, **parameters: int) -> httpx.Response:
    """One POST on a connection of its own, so that any HTTP process may take it."""
    url = f"{service.url}/classify"
    return httpx.post(url, params=parameters, files={"image": ("photo.jpg", photo)}, timeout=60)


def connect(service: Service) -> socket.socket:
    """A connection to the service."""
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(length: int, path: str = "/classify") -> bytes:
    """The head of a POST of so many bytes of an image."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: image/png", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def send(service: Service, photo: bytes) -> socket.socket:
    """A client that has sent a whole request, and waits."""
    client = connect(service)
    client.sendall(head(len(photo)) + photo)
    return client
