"""The protocols of others, one file each. A face reads its clients' requests, answers them by `Asking` as all faces do,
and gives answers and errors its form. Validity, limits, deadlines, keys and metrics of requests are the same for all.
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
"""The faces by their names in `--protocol`."""


def faces_of(settings: Settings) -> tuple[Face, ...]:
    """The enabled faces."""
    return tuple(FACES[name](settings) for name in settings.protocol)
