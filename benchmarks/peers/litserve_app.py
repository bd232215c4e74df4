"""LitServe: `batch_timeout` as in its guide to batching, `fast_queue` as it recommends for more than 100 requests/s.

An image comes as base64 in JSON, as in its own benchmark, and is decoded in the model's process.
"""

from __future__ import annotations

import base64
from typing import Any

import litserve

from benchmarks.peers.model import BATCH, Model, port


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Model()

    def decode_request(self, request: dict[str, str]) -> bytes:
        return self.model.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, pixels: list[bytes]) -> Any:
        return self.model.classify(pixels)

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"top_k": output}


if __name__ == "__main__":
    api = Classifier(max_batch_size=BATCH, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="auto", devices=1, fast_queue=True)
    server.run(host="127.0.0.1", port=port(), generate_client_file=False, log_level="warning")
