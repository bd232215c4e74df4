"""Jobs to pixels on the device, before they are computed: the stage that decodes. Called from one thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch

from server.device.runner import Prepared, Runner
from server.errors import ServerError
from server.images.nvjpeg import decode_jpegs, simplest_jpeg
from server.images.pillow import decode
from server.images.resizing import resize
from server.types import BatchKey, Job, ModelInfo

PART_PIXELS = 1 << 26
"""Of JPEGs that are decoded together, so that memory is bounded: 200 MB of bytes."""


class Preparer:
    """Decodes and resizes; on a GPU in a stream of its own, beside the batch that computes.

    Args:
        runner: Whose images they are.
        models: The models by name.
        max_pixels: Largest width x height of a file.
    """

    def __init__(self, runner: Runner, models: Mapping[str, ModelInfo], max_pixels: int) -> None:
        self._runner, self._models, self._max_pixels = runner, models, max_pixels
        self._stream = torch.cuda.Stream(runner.device) if runner.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, key: BatchKey, jobs: Sequence[Job]) -> list[Prepared | ServerError]:
        """A batch of jobs, ready to be computed, and the errors of those whose files cannot be decoded."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return self._prepare(key, jobs)

    def warm_up(self, key: BatchKey) -> None:
        """Prepares one image, so that no request pays for what is done once."""
        self(key, [Job(key.model, simplest_jpeg(), key.schedule, 1, 0.0, jpeg_pixels=64 * 48)])

    def _prepare(self, key: BatchKey, jobs: Sequence[Job]) -> list[Prepared | ServerError]:
        preprocessing = self._models[key.model].preprocessing
        batch = torch.empty(len(jobs), *key.input_size, 3, dtype=torch.uint8, device=self._runner.device)
        by_pillow = {index: job.pixels for index, job in enumerate(jobs) if not job.jpeg_pixels}
        errors: dict[int, ServerError] = {}
        for part in _parts(jobs):
            decoded = decode_jpegs([jobs[index].pixels for index in part], self._runner.device)
            known = {
                index: image
                for index, image in zip(part, decoded, strict=True)
                if image is not None and image[0].numel() == jobs[index].jpeg_pixels  # else two heads, two sizes
            }
            if known:
                batch[list(known)] = resize(list(known.values()), preprocessing)
            for index in set(part) - set(known):  # Pillow reads more, and else says what is wrong
                try:
                    by_pillow[index] = decode(jobs[index].pixels, preprocessing, self._max_pixels)
                except ServerError as error:
                    errors[index] = error
            # The decoder writes to its images from a stream that does not wait for ours: what it is given next must
            # not still be read.
            self._finish()
        if by_pillow:
            batch[list(by_pillow)] = self._runner.pixels(key, list(by_pillow.values()))
        good = [index for index in range(len(jobs)) if index not in errors]
        if errors:
            batch = batch[good]
        self._finish()
        rows = {index: row for row, index in enumerate(good)}
        return [Prepared(job, batch, rows[index]) if index in rows else errors[index] for index, job in enumerate(jobs)]

    def _finish(self) -> None:
        """Returns when the device has done what it was told."""
        if self._stream is not None:
            self._stream.synchronize()


def _parts(jobs: Sequence[Job]) -> Iterator[list[int]]:
    """Indices of JPEGs that are decoded together."""
    part: list[int] = []
    pixels = 0
    for index, job in enumerate(jobs):
        if job.jpeg_pixels:
            if part and pixels + job.jpeg_pixels > PART_PIXELS:
                yield part
                part, pixels = [], 0
            part.append(index)
            pixels += job.jpeg_pixels
    if part:
        yield part
