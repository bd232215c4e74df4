"""Each call of the server as a value: its request, the parser of its answer, and whether it may be repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx

from server.client.answers import (
    Answer,
    Embedding,
    Model,
    ModelCurve,
    ModelSummary,
    read_answers,
    read_curve,
    read_embeddings,
    read_model,
    read_models,
    read_summary,
)
from server.client.errors import CutOffError, ForeignError, UnreachableError, error_of
from server.client.images import Encoded, ImageLike, encode
from server.client.retries import Retries
from server.errors import QueueFullError, UnavailableError, shown

T = TypeVar("T")

R = int | Sequence[int] | str
"""`8`, a list with one for each block, "auto", or any text that the server parses so."""


class Dial(TypedDict, total=False):
    """Parameters of every request. The server checks them; None is not sent.

    Attributes:
        r: Tokens merged in each block; the deployment's when absent.
        model: A name of `models()`; the default when absent.
        max_r: With r="auto", the most tokens that it may merge in a block.
        min_agreement: With r="auto", the least expected share of answers equal to those of r=0.
        inflect: With a single r, a ramp: -1 from 2r down to 0, 1 from 0 up to 2r.
        deadline_ms: Time after which the answer is useless, including retries; at least 1.
    """

    r: R | None
    model: str | None
    max_r: int | None
    min_agreement: float | None
    inflect: float | None
    deadline_ms: float | None


class Asked(Dial, total=False):
    """Parameters of a classification.

    Attributes:
        top_k: Number of classes; 5 when absent.
        function_to_apply: Turns logits into scores: "softmax", "sigmoid" or "none"; the model's own when absent.
        threshold: With sigmoid, instead of top_k: the least score of the classes in the answer.
    """

    top_k: int | None
    function_to_apply: str | None
    threshold: float | None


class EmbedAsked(Dial, total=False):
    """Parameters of a request for vectors.

    Attributes:
        normalize: Whether to scale them to length 1; true when absent.
        dimensions: Number of their first numbers to keep; all when absent.
    """

    normalize: bool | None
    dimensions: int | None


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call.

    Attributes:
        read: Parses the JSON body of the answer.
        extra: Body and headers, for httpx.
        deadline_ms: Time after which the answer is useless, from the first try.
        is_idempotent: Whether repeating it has no further effect.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    params: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    deadline_ms: float | None = None
    is_idempotent: bool = True

    def request(self, http: httpx.Client | httpx.AsyncClient, elapsed_s: float) -> httpx.Request:
        """The request to send, `elapsed_s` after the first try, which shortens its deadline."""
        params = dict(self.params)
        if self.deadline_ms is not None:
            params["deadline_ms"] = str(max(1.0, self.deadline_ms - 1e3 * elapsed_s) if elapsed_s else self.deadline_ms)
        return http.build_request(self.method, self.path, params=params, **self.extra)

    def answer(self, response: httpx.Response) -> T:
        """Parses an answer. Raises ServerError for an error, and ForeignError if the answer is not a ToMe Server's."""
        if not response.is_success:
            raise error_of(response)
        try:
            return self.read(response.json())
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignError(
                f"{response.url} answered {response.status_code}, but not as a ToMe Server: {shown(response.text)}"
            ) from error

    def wait_s(self, retries: Retries, error: Exception, tries: int, elapsed_s: float, chance: float) -> float | None:
        """Seconds to wait before the next try after an error; None if there is none."""
        # A refused request has had no effect. If the connection or the engine broke, the change may have been made, and
        # a repetition would conflict with it.
        kinds: tuple[type[Exception], ...] = (UnreachableError, QueueFullError)
        if self.is_idempotent:
            kinds += (CutOffError, UnavailableError)
        if not isinstance(error, kinds):
            return None
        if self.deadline_ms is not None:
            retries = Retries(retries.count, min(retries.budget_s, self.deadline_ms / 1e3))
        return retries.wait_s(tries, elapsed_s, getattr(error, "retry_after_s", None), chance)


def classify(images: Sequence[ImageLike], asked: Asked) -> Call[list[Answer]]:
    """The call that classifies images in one request: one answer each."""
    files, extra = _sent(images)
    read = partial(read_answers, filenames=[file.filename for file in files])
    return Call("POST", "classify", read, _said(asked), extra, asked.get("deadline_ms"))


def embed(images: Sequence[ImageLike], asked: EmbedAsked) -> Call[list[Embedding]]:
    """The call for the vectors of images in one request: one each."""
    _, extra = _sent(images)
    said = {**_said(asked), "encoding_format": "base64"}
    return Call("POST", "v1/embeddings", read_embeddings, said, extra, asked.get("deadline_ms"))


def _sent(images: Sequence[ImageLike]) -> tuple[list[Encoded], dict[str, Any]]:
    """The files, and the body with them."""
    if isinstance(images, str | bytes | bytearray | memoryview) or not isinstance(images, Sequence):
        raise TypeError(f"images is a {type(images).__qualname__}; it must be a list or a tuple of images")
    if not images:
        raise ValueError("images is empty; it must have at least one image")
    files = [encode(image) for image in images]
    # A raw body costs the server least, because there is no form or base64 to parse (150 kB: 0.02 ms, a form 0.13, JSON
    # 0.68). It has room for one image. The server checks the image itself, not the content type.
    kind = "application/octet-stream"
    if len(files) == 1:
        extra: dict[str, Any] = {"content": files[0].content, "headers": {"content-type": kind}}
    else:
        extra = {"files": [("image", (file.filename or "image", file.content, kind)) for file in files]}
    return files, extra


def _said(asked: Dial) -> dict[str, str]:
    """The query without the deadline, which shrinks with each try."""
    return {name: _text(value) for name, value in asked.items() if value is not None and name != "deadline_ms"}


def models() -> Call[list[ModelSummary]]:
    return Call("GET", "v1/models", read_models)


def model(name: str) -> Call[Model]:
    return Call("GET", _path(name), read_model)


def curve(name: str) -> Call[ModelCurve]:
    return Call("GET", f"{_path(name)}/curve", read_curve)


def set_r(
    name: str,
    r: R,
    max_r: int | None,
    min_agreement: float | None,
    inflect: float | None,
    if_version: int | None,
) -> Call[ModelSummary]:
    """The call that changes the `r` of a deployment."""
    said = {"r": _text(r), "max_r": max_r, "min_agreement": min_agreement, "inflect": inflect}
    extra: dict[str, Any] = {"json": {name: value for name, value in said.items() if value is not None}}
    if if_version is not None:
        extra["headers"] = {"if-match": f'"{if_version}"'}
    return Call("PATCH", _path(name), read_summary, extra=extra, is_idempotent=if_version is None)


def _path(name: str) -> str:
    return f"v1/models/{quote(name, safe='')}"


def _text(value: object) -> str:
    """A parameter as text. A list has brackets, because a list of one would be a number without them."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
