"""Traffic of all kinds of clients, and the answers that they may get."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files

import httpx
from PIL import Image

from server.bench.client import Target

TIMEOUT_S = 60.0
LISTS = ("16,14,12,10", "8,8,8,0,0,4", "0,0,0,0,12", "1,2,3,4,5,6,7,8", "2,0,2,0,2,0")
READS = ("/metrics", "/readyz", "/v1/models", "/", "/v1/config", "/docs", "/openapi.json")
BUSY = frozenset({429})
"""A request for work may be refused with this status, which says when to retry."""

SLOW_PIECE_S = 0.5


@dataclass
class Answers:
    """Counts of answers, and of wrong ones.

    Attributes:
        counts: Count of each kind of traffic and status, or no answer.
        wrong: Count of statuses that its requests may not get.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, kind: str, status: int | str, allowed: frozenset[int]) -> None:
        """Counts an answer's status, or the name of the error that came instead."""
        self.counts[kind, str(status)] += 1
        if status not in allowed:
            self.wrong[kind, str(status)] += 1


class Traffic:
    """Requests of every kind: good and bad files, all sorts of r, changes, clients that leave.

    Args:
        target: The server.
        model: The name of its model.
        seed: Seed of all random choices.
    """

    def __init__(self, target: Target, model: str, seed: int = 0) -> None:
        self._target, self._model, self._random = target, model, random.Random(seed)
        self._good, self._bad = list(good_files()), list(bad_files())
        self._client = httpx.AsyncClient(
            base_url=str(target), timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)
        )
        self.answers = Answers()
        self._kinds: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "classify": (0.42, self._classify),
            "several images": (0.12, self._several),
            "JSON": (0.06, self._json),
            "explain": (0.06, self._explain),
            "bad file": (0.12, self._bad_file),
            "with a deadline": (0.05, self._deadline),
            "new list": (0.01, self._new_list),
            "change": (0.02, self._change),
            "read": (0.04, self._read),
            "HEAD": (0.02, self._head),
            "leaves": (0.05, self._leave),
            "slow": (0.03, self._slow),
        }

    async def one(self) -> None:
        """Sends a request of some kind and counts the answer."""
        kinds, weights = list(self._kinds), [share for share, _ in self._kinds.values()]
        (kind,) = self._random.choices(kinds, weights)
        try:
            await self._kinds[kind][1]()
        except (httpx.HTTPError, OSError) as error:
            self.answers.note(kind, type(error).__name__, frozenset())

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    def _query(self) -> dict[str, str]:
        r = self._random.choice(("", "0", "4", "8", "13", "auto", self._random.choice(LISTS)))
        return {"r": r} if r else {"top_k": "3"}

    async def _post(self, kind: str, path: str, allowed: frozenset[int], **content: object) -> None:
        answer = await self._client.post(path, **content)  # type: ignore[arg-type]
        self.answers.note(kind, answer.status_code, allowed | BUSY)

    async def _classify(self) -> None:
        file = self._random.choice(self._good)
        await self._post("classify", "/classify", OK, content=file, params=self._query(), headers=RAW)

    async def _explain(self) -> None:
        file = self._random.choice(self._good)
        await self._post("explain", "/v1/explain", OK, content=file, params=self._query(), headers=RAW)

    async def _several(self) -> None:
        chosen = self._random.choices(self._good, k=self._random.randint(2, 5))
        form = [("image", (f"{index}.jpg", file)) for index, file in enumerate(chosen)]
        await self._post("several images", "/classify", OK, files=form, params=self._query())

    async def _json(self) -> None:
        body = {"images": [base64.b64encode(self._random.choice(self._good)).decode()], "r": 8}
        await self._post("JSON", "/classify", OK, json=body)

    async def _bad_file(self) -> None:
        file = self._random.choice(self._bad)
        await self._post("bad file", "/classify", frozenset({400, 413, 415}), content=file, headers=RAW)

    async def _deadline(self) -> None:
        query = {"deadline_ms": str(self._random.choice((5, 50, 500, 5000)))} | self._query()
        file = self._random.choice(self._good)
        await self._post("with a deadline", "/classify", OK | {504}, content=file, params=query, headers=RAW)

    async def _new_list(self) -> None:
        r = ",".join(str(self._random.randint(0, 8)) for _ in range(6))
        file = self._random.choice(self._good)
        await self._post("new list", "/classify", OK, content=file, params={"r": r}, headers=RAW)

    async def _change(self) -> None:
        r = self._random.choice((0, 4, 8, "auto", [8, 8]))
        answer = await self._client.patch(f"/v1/models/{self._model}", json={"r": r})
        self.answers.note("change", answer.status_code, OK)

    async def _read(self) -> None:
        answer = await self._client.get(self._random.choice(READS))
        self.answers.note("read", answer.status_code, OK)

    async def _head(self) -> None:
        answer = await self._client.head(self._random.choice(READS))
        self.answers.note("HEAD", answer.status_code, OK)

    async def _leave(self) -> None:
        """Sends all or a part of a request, and hangs up."""
        file = self._random.choice(self._good)
        sent = file[: self._random.choice((100, len(file)))]
        _, writer = await asyncio.open_connection(self._target.host, self._target.port)
        writer.write(head_of(file) + sent)
        await writer.drain()
        await asyncio.sleep(0.05 * self._random.random())
        writer.close()
        self.answers.counts["leaves", "-"] += 1

    async def _slow(self) -> None:
        """Sends a request in pieces, with pauses between them."""
        file = self._good[0]
        request, pieces = head_of(file) + file, 6
        reader, writer = await asyncio.open_connection(self._target.host, self._target.port)
        try:
            size = -(-len(request) // pieces)
            for at in range(0, len(request), size):
                writer.write(request[at : at + size])
                await writer.drain()
                await asyncio.sleep(SLOW_PIECE_S)
            async with asyncio.timeout(TIMEOUT_S):
                line = await reader.readline()
            said = line.split(b" ")
            status = int(said[1]) if len(said) > 1 else "nothing"
            self.answers.note("slow", status, OK | BUSY)
        finally:
            writer.close()


OK = frozenset({200})
RAW = {"content-type": "application/octet-stream"}


def head_of(file: bytes) -> bytes:
    """The head of a request that sends a file and closes its connection."""
    return (
        b"POST /classify HTTP/1.1\r\nHost: soak\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(file)
    )


def good_files() -> Iterator[bytes]:
    """The project's own samples, unchanged and in other formats, modes and sizes."""
    for sample in sorted(files("server").joinpath("static/samples").iterdir(), key=lambda file: file.name):
        yield sample.read_bytes()
    photo = Image.open(io.BytesIO(files("server").joinpath("static/samples/lighthouse.jpg").read_bytes()))
    for format in ("PNG", "WEBP", "BMP", "TIFF", "AVIF"):
        yield encoded(photo, format)
    yield encoded(photo.convert("P"), "GIF")
    yield encoded(photo.convert("L"), "JPEG")
    yield encoded(photo.resize((1600, 1200)), "JPEG")
    yield encoded(photo.resize((3000, 2000)), "PNG")


def bad_files() -> Iterator[bytes]:
    """Files that are not images, or are incomplete."""
    whole = files("server").joinpath("static/samples/lighthouse.jpg").read_bytes()
    yield from (b"", b"x" * 1000, whole[:2000], random.Random(1).randbytes(5000))
    yield encoded(Image.open(io.BytesIO(whole)), "PNG")[:700]
    yield encoded(Image.new("RGB", (9000, 9000)), "PNG")  # more pixels than are allowed


def encoded(image: Image.Image, format: str) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()
