"""Ray Serve: `serve.batch` in one replica that takes the requests of two full batches at once.

Images are decoded in threads, so that they do not block the replica's loop.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.model import BATCH, Model, port


@serve.deployment(max_ongoing_requests=2 * BATCH, logging_config={"enable_access_log": False})
class Classifier:
    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.01)
    async def classify(self, pixels: list[bytes]) -> Any:
        return await asyncio.to_thread(self.model.classify, pixels)

    async def __call__(self, request: Request) -> dict[str, Any]:
        pixels = await asyncio.to_thread(self.model.decode, await request.body())
        return {"top_k": await self.classify(pixels)}


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # Ray would abort on these signals
    with tempfile.TemporaryDirectory() as folder:
        # A separate cluster: without these two arguments it would join, and end, one that already runs on this machine.
        ray.init(address="local", _temp_dir=folder, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port()})
        deployment: Any = Classifier
        serve.run(deployment.bind())
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        serve.shutdown()
        ray.shutdown()
