"""An open loop of requests: they come when they come, whether or not the server keeps up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one request.

    Attributes:
        photo: Which photo was sent.
        status: Of HTTP; 0 where the connection broke.
        seconds: From the time at which it was due to its answer.
        body: Parsed JSON, or None.
    """

    photo: int
    status: int
    seconds: float
    body: dict[str, Any] | None


def poisson(per_s: float, seconds: float, seed: int) -> Iterator[float]:
    """Times at which requests are due that know nothing of each other."""
    numbers, now = random.Random(seed), 0.0
    while (now := now + numbers.expovariate(per_s)) < seconds:
        yield now


async def open_loop(
    address: tuple[str, int], path: str, photos: Sequence[bytes], due: Sequence[float], content_type: str = "image/jpeg"
) -> list[Reply]:
    """Sends a photo at each due time, in seconds from now, over as many kept connections as that takes."""
    connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    start = time.perf_counter()

    async def send(number: int, at: float) -> Reply:
        await asyncio.sleep(start + at - time.perf_counter())
        photo = number % len(photos)
        try:
            reader, writer = connections.pop() if connections else await asyncio.open_connection(*address)
            status, body = await post(reader, writer, path, photos[photo], content_type)
            connections.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            status, body = 0, b""
        seconds = time.perf_counter() - start - at
        return Reply(photo, status, seconds, json.loads(body) if status == 200 else None)

    try:
        return await asyncio.gather(*(send(number, at) for number, at in enumerate(due)))
    finally:
        for _, writer in connections:
            writer.close()


async def closed_loop(
    address: tuple[str, int], path: str, photos: Sequence[bytes], clients: int, seconds: float
) -> float:
    """Images a second of so many clients, each with one request at a time."""
    end = time.perf_counter() + seconds

    async def client(number: int) -> int:
        reader, writer = await asyncio.open_connection(*address)
        count = 0
        while time.perf_counter() < end:
            status, _ = await post(reader, writer, path, photos[(number + count) % len(photos)], "image/jpeg")
            count += status == 200
        writer.close()
        return count

    start = time.perf_counter()
    done = sum(await asyncio.gather(*map(client, range(clients))))
    return done / (time.perf_counter() - start)


async def post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes, content_type: str
) -> tuple[int, bytes]:
    """One request over a kept connection: its status and the answer's body."""
    head = [f"POST {path} HTTP/1.1", "host: localhost", f"content-type: {content_type}", f"content-length: {len(body)}"]
    writer.write("\r\n".join([*head, "", ""]).encode() + body)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)
