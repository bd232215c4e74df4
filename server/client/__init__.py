"""ToMe Server from Python: `Client` and `AsyncClient`, over httpx.

    from server.client import Client

    with Client("http://localhost:8000") as client:
        answer = client.classify("photo.jpg", r=8)
        print(answer.label, answer.top.score, answer.r, answer.timings_ms.total)

It imports neither torch nor FastAPI, and Pillow only for pixels. An error of the server is raised as its class in
`server.errors`. If no answer came, the subclasses of `NoAnswerError` say why.
"""

from __future__ import annotations

try:
    import httpx  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "httpx":
        raise
    raise ModuleNotFoundError("server.client needs httpx: pip install 'tome-server[client]'", name="httpx") from None

from server.client.answers import Answer, Class, Embedding, Model, ModelCurve, ModelCurveRow, ModelSummary, TimingsMs
from server.client.calls import Asked, EmbedAsked
from server.client.clients import AsyncClient, Client
from server.client.errors import CutOffError, ForeignError, LateError, NoAnswerError, UnreachableError
from server.client.images import ImageLike
from server.client.retries import Retries

__all__ = [
    "Answer",
    "Asked",
    "AsyncClient",
    "Class",
    "Client",
    "ModelCurve",
    "ModelCurveRow",
    "CutOffError",
    "EmbedAsked",
    "Embedding",
    "ForeignError",
    "ImageLike",
    "LateError",
    "Model",
    "ModelSummary",
    "NoAnswerError",
    "Retries",
    "TimingsMs",
    "UnreachableError",
]
