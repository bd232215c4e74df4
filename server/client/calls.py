"""Each call of the server as a value: how it is asked, how its answer is read, whether it may be asked twice."""

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
"""`8`, a list of one per block, "auto", or any text that the server reads as one of these."""


class Dial(TypedDict, total=False):
    """What every request may say; the server checks it, and None is not said.

    Attributes:
        r: Tokens merged in each block; the deployment's when absent.
        model: A name of `models()`; the default when absent.
        max_r: With r="auto", the most tokens that it may merge in a block.
        min_agreement: With r="auto", the least expected share of answers that are those of r=0.
        inflect: With a single r, a ramp: -1 from 2r down to 0, 1 from 0 up to 2r.
        deadline_ms: Time after which the answer is worth nothing, retries included; 1 at least.
    """

    r: R | None
    model: str | None
    max_r: int | None
    min_agreement: float | None
    inflect: float | None
    deadline_ms: float | None


class Asked(Dial, total=False):
    """How a classification is asked for.

    Attributes:
        top_k: How many classes to name; 5 when absent.
        function_to_apply: What makes scores of logits: "softmax", "sigmoid" or "none"; the model's own when absent.
        threshold: With sigmoid, in place of top_k: the least score of a class that is named.
    """

    top_k: int | None
    function_to_apply: str | None
    threshold: float | None


class EmbedAsked(Dial, total=False):
    """How vectors are asked for.

    Attributes:
        normalize: Whether they have length 1; they do when absent.
        dimensions: How many of their first numbers; all when absent.
    """

    normalize: bool | None
    dimensions: int | None


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call.

    Attributes:
        read: Makes the answer of the JSON body.
        extra: Body and headers, as httpx takes them.
        deadline_ms: Time after which the answer is worth nothing, from the first try.
        is_idempotent: Whether doing it twice is doing it once.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    params: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    deadline_ms: float | None = None
    is_idempotent: bool = True

    def request(self, http: httpx.Client | httpx.AsyncClient, elapsed_s: float) -> httpx.Request:
        """What to send, so many seconds after the first try: a deadline has come nearer meanwhile."""
        params = dict(self.params)
        if self.deadline_ms is not None:
            params["deadline_ms"] = str(max(1.0, self.deadline_ms - 1e3 * elapsed_s) if elapsed_s else self.deadline_ms)
        return http.build_request(self.method, self.path, params=params, **self.extra)

    def answer(self, response: httpx.Response) -> T:
        """What the server said; raises ServerError where it is an error, ForeignError where it is not the server's."""
        if not response.is_success:
            raise error_of(response)
        try:
            return self.read(response.json())
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignError(
                f"{response.url} answered {response.status_code}, but not as a ToMe Server: {shown(response.text)}"
            ) from error

    def wait_s(self, retries: Retries, error: Exception, tries: int, elapsed_s: float, chance: float) -> float | None:
        """Seconds to wait before the next try after an error, or None where there is none."""
        # A refusal has done nothing; where the connection broke, or the engine with it, the change may have been made,
        # and would then be in conflict with itself.
        kinds: tuple[type[Exception], ...] = (UnreachableError, QueueFullError)
        if self.is_idempotent:
            kinds += (CutOffError, UnavailableError)
        if not isinstance(error, kinds):
            return None
        if self.deadline_ms is not None:
            retries = Retries(retries.count, min(retries.budget_s, self.deadline_ms / 1e3))
        return retries.wait_s(tries, elapsed_s, getattr(error, "retry_after_s", None), chance)


def classify(images: Sequence[ImageLike], asked: Asked) -> Call[list[Answer]]:
    """Asks for the classes of images, in one request: one answer each."""
    files, extra = _sent(images)
    read = partial(read_answers, filenames=[file.filename for file in files])
    return Call("POST", "classify", read, _said(asked), extra, asked.get("deadline_ms"))


def embed(images: Sequence[ImageLike], asked: EmbedAsked) -> Call[list[Embedding]]:
    """Asks for the vectors of images, in one request: one each."""
    _, extra = _sent(images)
    said = {**_said(asked), "encoding_format": "base64"}
    return Call("POST", "v1/embeddings", read_embeddings, said, extra, asked.get("deadline_ms"))


def _sent(images: Sequence[ImageLike]) -> tuple[list[Encoded], dict[str, Any]]:
    """The files, and the body that holds them."""
    if isinstance(images, str | bytes | bytearray | memoryview) or not isinstance(images, Sequence):
        raise TypeError(f"images is a {type(images).__qualname__}; it must be a list or a tuple of images")
    if not images:
        raise ValueError("images is empty; it must hold an image or more")
    files = [encode(image) for image in images]
    # A raw body costs the server least, as it has no form to parse and no base64 (150 kB: 0.02 ms, a form 0.13, JSON
    # 0.68); it has room for one image. The server looks at the image, not at the type that is said.
    kind = "application/octet-stream"
    if len(files) == 1:
        extra: dict[str, Any] = {"content": files[0].content, "headers": {"content-type": kind}}
    else:
        extra = {"files": [("image", (file.filename or "image", file.content, kind)) for file in files]}
    return files, extra


def _said(asked: Dial) -> dict[str, str]:
    """The query, but for the deadline, which comes nearer with each try."""
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
    """Asks for another `r` of a deployment."""
    said = {"r": _text(r), "max_r": max_r, "min_agreement": min_agreement, "inflect": inflect}
    extra: dict[str, Any] = {"json": {name: value for name, value in said.items() if value is not None}}
    if if_version is not None:
        extra["headers"] = {"if-match": f'"{if_version}"'}
    return Call("PATCH", _path(name), read_summary, extra=extra, is_idempotent=if_version is None)


def _path(name: str) -> str:
    return f"v1/models/{quote(name, safe='')}"


def _text(value: object) -> str:
    """A parameter as text; a list in brackets, without which a list of one would be a number."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
