"""The model of all peers: timm's own model with our preprocessing, so that only the servers differ.

Variables: PEER_PORT, PEER_MODEL, PEER_WEIGHTS, PEER_DEVICE, PEER_PRECISION (fp32, bf16 or fp16), PEER_THREADS, and
PEER_BATCH, the most images in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from server.device.models import load_model
from server.device.runner import pick_device
from server.device.torch_backend import set_threads
from server.images.pillow import decode
from server.model_spec import ModelSpec

MAX_PIXELS = 89_000_000
BATCH = int(os.environ.get("PEER_BATCH", "32"))
TOP_K = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def port() -> int:
    """The port to listen on."""
    return int(os.environ.get("PEER_PORT", "8000"))


class Model:
    """The model of the variables: pixels in, likeliest classes out."""

    def __init__(self) -> None:
        set_threads(int(os.environ.get("PEER_THREADS", "0")))
        spec = {"source": os.environ.get("PEER_MODEL", "bundled"), "weights": os.environ.get("PEER_WEIGHTS")}
        loaded = load_model(ModelSpec.model_validate(spec))
        self._info = loaded.info
        self._device = torch.device(pick_device(os.environ.get("PEER_DEVICE", "auto")))
        self._dtype = DTYPES[os.environ.get("PEER_PRECISION", "fp32")]
        self._timm: Any = loaded.merged.model.to(self._device, self._dtype).eval()
        preprocessing = loaded.info.preprocessing
        mean, std = (
            torch.tensor(v, device=self._device)[:, None, None] for v in (preprocessing.mean, preprocessing.std)
        )
        self._scale, self._offset = 1 / (255 * std), -mean / std

    def decode(self, encoded: bytes) -> bytes:
        """An image file to rows of RGB bytes at the model's input size."""
        return decode(encoded, self._info.preprocessing, MAX_PIXELS)

    @torch.inference_mode()
    def classify(self, pixels: Sequence[bytes]) -> list[list[dict[str, Any]]]:
        """The likeliest classes of each image of a batch."""
        packed = torch.frombuffer(bytearray().join(pixels), dtype=torch.uint8)
        images = packed.view(len(pixels), *self._info.preprocessing.input_size, 3).to(self._device).permute(0, 3, 1, 2)
        logits = self._timm(torch.addcmul(self._offset, images.float(), self._scale).to(self._dtype))
        scores, indices = logits.float().softmax(dim=1).topk(TOP_K, dim=1)
        return [
            [{"label": self._info.labels[index], "score": score} for index, score in zip(*row, strict=True)]
            for row in zip(indices.tolist(), scores.tolist(), strict=True)
        ]
