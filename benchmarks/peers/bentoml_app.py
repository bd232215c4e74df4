"""BentoML: adaptive batching in a service of the model, behind one that takes one image, as in its guide.

Under load the service in front answers a few requests with 500, "Server disconnected", from the model's service.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import ContentType

from benchmarks.peers.model import BATCH, Model


@bentoml.service(traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, max_batch_size=BATCH)
    def classify(self, pixels: np.ndarray) -> list[list[dict[str, Any]]]:
        return self.model.classify([image.tobytes() for image in pixels])


@bentoml.service(traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Front:
    classifier = bentoml.depends(Classifier)

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api
    async def classify(self, photo: Annotated[bytes, ContentType("image/jpeg")], /) -> dict[str, Any]:
        pixels = await asyncio.to_thread(self.model.decode, photo)
        (top_k,) = await self.classifier.to_async.classify(np.frombuffer(pixels, np.uint8)[None])
        return {"top_k": top_k}
