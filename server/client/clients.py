"""The two clients. They differ only in how they send and wait."""

from __future__ import annotations

import asyncio
import random
from asyncio import sleep as sleep_async
from collections.abc import Sequence
from time import monotonic, sleep
from typing import Any, Self, TypeVar, Unpack

import httpx

from server.client import calls
from server.client.answers import Answer, Embedding, Model, ModelCurve, ModelSummary
from server.client.calls import Asked, Call, EmbedAsked, R
from server.client.errors import NoAnswerError, no_answer
from server.client.images import ImageLike
from server.client.retries import Retries
from server.errors import ServerError

T = TypeVar("T")

URL = "http://localhost:8000"
RETRIES = Retries()
_CONNECT_S = 5.0  # a reachable host accepts at once, however long its answer takes


def _options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Common arguments of httpx's two clients."""
    base = httpx.URL(url)
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError(f"url is {url!r}; it must be like {URL}")
    return {
        "base_url": base,
        "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S)),
    }


class Client:
    """A client of one ToMe Server, for any number of threads.

    To classify many images, send several requests at a time, so that the server can batch them: `with
    ThreadPoolExecutor(16) as pool: answers = list(pool.map(client.classify, paths))`.

    Args:
        url: The server; a path prefix is kept.
        api_key: The key to send; changes may need the admin key.
        timeout_s: Longest silence of the server; must exceed its `deadline_s`.
        retries: Retries when the server is full, restarts or hangs up; never after a timeout.
        transport: httpx's transport: a Unix socket, a proxy, an application in this process.

    Every method raises a ServerError of `server.errors`, or a NoAnswerError.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries = RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**_options(url, api_key, timeout_s), transport=transport)
        self._retries = retries

    def classify(self, image: ImageLike, **asked: Unpack[Asked]) -> Answer:
        """Classifies an image; `Asked` lists the parameters."""
        return self._ask(calls.classify([image], asked))[0]

    def classify_all(self, images: Sequence[ImageLike], **asked: Unpack[Asked]) -> list[Answer]:
        """Classifies images in one request: all with one `r`, and all or none."""
        return self._ask(calls.classify(images, asked))

    def embed(self, image: ImageLike, **asked: Unpack[EmbedAsked]) -> Embedding:
        """The vector of an image, for search; `EmbedAsked` lists the parameters."""
        return self._ask(calls.embed([image], asked))[0]

    def embed_all(self, images: Sequence[ImageLike], **asked: Unpack[EmbedAsked]) -> list[Embedding]:
        """The vectors of images in one request: all with one `r`, and all or none."""
        return self._ask(calls.embed(images, asked))

    def models(self) -> list[ModelSummary]:
        """The served models, the default first."""
        return self._ask(calls.models())

    def model(self, name: str) -> Model:
        """The full description of a model."""
        return self._ask(calls.model(name))

    def curve(self, name: str) -> ModelCurve:
        """The cost and accuracy of each `r` of a model; raises NotFoundError if nobody measured them."""
        return self._ask(calls.curve(name))

    def set_r(
        self,
        name: str,
        r: R,
        *,
        max_r: int | None = None,
        min_agreement: float | None = None,
        inflect: float | None = None,
        if_version: int | None = None,
    ) -> ModelSummary:
        """Changes the deployment's `r`, for requests that name none.

        Args:
            name: The model.
            r: See `Asked`, also for `max_r`, `min_agreement` and `inflect`.
            if_version: The `config_version` that the change is based on; raises ConflictError if it is another now.
                Such a change is not repeated when its answer is lost.
        """
        return self._ask(calls.set_r(name, r, max_r, min_agreement, inflect, if_version))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, call: Call[T]) -> T:
        start, elapsed_s, tries = monotonic(), 0.0, 0
        while True:
            tries += 1
            try:
                with no_answer(str(self._http.base_url)):
                    response = self._http.send(call.request(self._http, elapsed_s))
                return call.answer(response)
            except (ServerError, NoAnswerError) as error:
                wait_s = call.wait_s(self._retries, error, tries, monotonic() - start, random.random())
                if wait_s is None:
                    raise
            sleep(wait_s)
            elapsed_s = monotonic() - start


class AsyncClient:
    """`Client` for asyncio; use `asyncio.gather` for several requests at a time. Files are read in threads."""

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**_options(url, api_key, timeout_s), transport=transport)
        self._retries = retries

    async def classify(self, image: ImageLike, **asked: Unpack[Asked]) -> Answer:
        """Classifies an image; `Asked` lists the parameters."""
        return (await self.classify_all([image], **asked))[0]

    async def classify_all(self, images: Sequence[ImageLike], **asked: Unpack[Asked]) -> list[Answer]:
        """Classifies images in one request: all with one `r`, and all or none."""
        return await self._ask(await asyncio.to_thread(calls.classify, images, asked))

    async def embed(self, image: ImageLike, **asked: Unpack[EmbedAsked]) -> Embedding:
        """The vector of an image, for search; `EmbedAsked` lists the parameters."""
        return (await self.embed_all([image], **asked))[0]

    async def embed_all(self, images: Sequence[ImageLike], **asked: Unpack[EmbedAsked]) -> list[Embedding]:
        """The vectors of images in one request: all with one `r`, and all or none."""
        return await self._ask(await asyncio.to_thread(calls.embed, images, asked))

    async def models(self) -> list[ModelSummary]:
        """The served models, the default first."""
        return await self._ask(calls.models())

    async def model(self, name: str) -> Model:
        """The full description of a model."""
        return await self._ask(calls.model(name))

    async def curve(self, name: str) -> ModelCurve:
        """The cost and accuracy of each `r` of a model; raises NotFoundError if nobody measured them."""
        return await self._ask(calls.curve(name))

    async def set_r(
        self,
        name: str,
        r: R,
        *,
        max_r: int | None = None,
        min_agreement: float | None = None,
        inflect: float | None = None,
        if_version: int | None = None,
    ) -> ModelSummary:
        """Changes the deployment's `r`, for requests that name none; see `Client.set_r`."""
        return await self._ask(calls.set_r(name, r, max_r, min_agreement, inflect, if_version))

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _ask(self, call: Call[T]) -> T:
        start, elapsed_s, tries = monotonic(), 0.0, 0
        while True:
            tries += 1
            try:
                with no_answer(str(self._http.base_url)):
                    response = await self._http.send(call.request(self._http, elapsed_s))
                return call.answer(response)
            except (ServerError, NoAnswerError) as error:
                wait_s = call.wait_s(self._retries, error, tries, monotonic() - start, random.random())
                if wait_s is None:
                    raise
            await sleep_async(wait_s)
            elapsed_s = monotonic() - start
