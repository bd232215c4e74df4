"""The device: loaded models in, batches of pixels through them, likeliest classes out. Called from one thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from server.device.backend import BackendOptions, choose_backend
from server.device.models import LoadedModel
from server.dial import r_of, text_of
from server.errors import EngineError
from server.settings import SettingsError
from server.types import BackendInfo, BatchKey, Job, TopK
from tome_core import MergedViT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose image is ready: one row of a batch of pixels (B, H, W, 3), uint8, on the device."""

    job: Job
    batch: Tensor
    row: int


class Runner:
    """Runs batches on one device.

    Args:
        models: The models by name.
        device: A torch device, or "auto".
        precision: "fp32", "bf16", "fp16", "fp8", or "auto".
        backend: What computes on the device; torch where nothing is said.

    Raises:
        SettingsError: There is no such device, or the backend or precision that was asked for cannot be had.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        device: str = "auto",
        precision: str = "auto",
        backend: BackendOptions | None = None,
    ) -> None:
        if "," in device:
            raise SettingsError(f"device {device!r}: one device computes here; 'tome-server serve' takes several")
        try:
            self._device = torch.device(pick_device(device))
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it has not
            raise SettingsError(f"device {device!r}: {error}") from error
        options = backend or BackendOptions()
        with on(self._device):
            self._backends = {
                name: choose_backend(loaded, self._device, precision, options) for name, loaded in models.items()
            }

    @torch.inference_mode()
    def run_batch(self, key: BatchKey, jobs: Sequence[Job]) -> list[TopK]:
        """Classifies the jobs' images, which are pixels, under the key's schedule."""
        return self._classify(key, self.pixels(key, [job.pixels for job in jobs]), jobs)

    @torch.inference_mode()
    def run_prepared(self, key: BatchKey, prepared: Sequence[Prepared]) -> list[TopK]:
        """Classifies images that are ready under the key's schedule."""
        pixels = prepared[0].batch
        if len(prepared) < len(pixels) or any(each.batch is not pixels for each in prepared):  # a part, or of several
            pixels = torch.stack([each.batch[each.row] for each in prepared])
        return self._classify(key, pixels, [each.job for each in prepared])

    def _classify(self, key: BatchKey, pixels: Tensor, jobs: Sequence[Job]) -> list[TopK]:
        backend = self._backends[key.model]
        with on(self._device):
            probabilities = backend.logits(pixels, key.schedule).float().softmax(dim=1)
        scores, indices = probabilities.topk(max(job.top_k for job in jobs), dim=1)
        if not scores.isfinite().all():
            raise EngineError(
                f"{key.model} gives numbers that are none in {backend.info.precision}; try another --precision"
            )
        rows = zip(jobs, indices.tolist(), scores.tolist(), strict=True)
        return [TopK(indices[: job.top_k], scores[: job.top_k]) for job, indices, scores in rows]

    def backend(self, model: str) -> BackendInfo:
        """What computes a model's answers here, and why."""
        return self._backends[model].info

    def merged(self, model: str) -> MergedViT:
        """A model as torch computes it here, from pixels: to follow tokens, or to do without recordings."""
        return self._backends[model].merged

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def check(self) -> None:
        """Does the simplest work there is; raises when the device is broken for good, as after an illegal access."""
        torch.ones(1, device=self._device).sum().item()

    def warm_up(self, key: BatchKey) -> None:
        """Compiles where that is needed, and classifies one black image: no request pays for what is done once."""
        start = time.perf_counter()
        backend = self._backends[key.model]
        with on(self._device):
            backend.warm_up(key.schedule)
        height, width = key.input_size
        self.run_batch(key, [Job(key.model, bytes(height * width * 3), key.schedule, 1, 0.0)])
        took_s, r = time.perf_counter() - start, text_of(r_of(key.schedule))
        logger.info(
            "%s at r=%s is warm on %s in %s (%.2f s)", key.model, r, self._device, backend.info.precision, took_s
        )

    def pixels(self, key: BatchKey, rows: Sequence[bytes]) -> Tensor:
        """Bytes of RGB rows to what the model takes: the batch (B, H, W, 3) in uint8, on its device."""
        joined = torch.frombuffer(bytearray().join(rows), dtype=torch.uint8)
        return joined.view(len(rows), *key.input_size, 3).to(self._device)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one of this thread: Triton's kernels and CUDA graphs run there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pick_device(device: str) -> str:
    """The device that "auto" stands for."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
