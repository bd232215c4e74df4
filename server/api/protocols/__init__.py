"""The protocols of others, one file each. A face reads what its clients send, asks as every face does (`Asking`), and
shapes the answer and the errors. What a request may be, its limits, deadlines, keys and counts are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from server.api.faces import Face
from server.api.protocols import embeddings, huggingface, kserve, oip, sagemaker, torchserve, vertex
from server.settings import Settings

FACES: Mapping[str, Callable[[Settings], Face]] = {
    "oip": oip.face,
    "embeddings": embeddings.face,
    "huggingface": huggingface.face,
    "torchserve": torchserve.face,
    "kserve": kserve.face,
    "sagemaker": sagemaker.face,
    "vertex": vertex.face,
}
"""By name, as `--protocol` lists them."""


def faces_of(settings: Settings) -> tuple[Face, ...]:
    """The faces that are on."""
    return tuple(FACES[name](settings) for name in settings.protocol)
