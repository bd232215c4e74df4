"""Items to pixels on the device, before they are computed: the stage that decodes. Called from one thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from time import monotonic

import torch

from server.device.prepared import PixelBatch, Prepared, stacked
from server.errors import ServerError
from server.images.image import JpegFile, Pixels
from server.images.nvjpeg import decoder_on, simplest_jpeg
from server.images.pillow import decode
from server.ipc.messages import Classify, Item
from server.types import BatchKey, ModelInfo

PART_PIXELS = 1 << 26
"""Most pixels of JPEGs that are decoded together, which bounds memory: 200 MB of bytes."""


class Preparer:
    """Decodes and resizes; on a GPU in a separate stream, beside the batch that computes.

    Args:
        device: The device of the pixels.
        models: The models by name.
        max_pixels: Largest width x height of a file.

    Raises:
        OSError: There is no decoder for the device.
    """

    def __init__(self, device: torch.device, models: Mapping[str, ModelInfo], max_pixels: int) -> None:
        self._device, self._models, self._max_pixels = device, models, max_pixels
        self._decode = decoder_on(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, key: BatchKey, items: Sequence[Item]) -> list[Prepared | ServerError]:
        """A batch of items that are ready to be computed, and the errors of those whose files cannot be decoded."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return self._prepare(key, items)

    def warm_up(self, key: BatchKey) -> None:
        """Prepares one image, so that no request pays for one-time work."""
        self(key, [Item(Classify(model=key.model, images=[simplest_jpeg()], deadline=monotonic(), top_k=1), 0)])

    def _prepare(self, key: BatchKey, items: Sequence[Item]) -> list[Prepared | ServerError]:
        preprocessing = self._models[key.model].preprocessing
        batch = torch.empty(len(items), *key.input_size, 3, dtype=torch.uint8, device=self._device)
        images = [item.image for item in items]
        pixels = {index: image.data for index, image in enumerate(images) if isinstance(image, Pixels)}
        errors: dict[int, ServerError] = {}
        for part, files in _parts(images):
            refused = self._decode(files, preprocessing, batch, part)
            # The next part reuses this part's memory, which nvJPEG fills from its own streams; and the files must stay
            # until they are read.
            self._finish()
            for position in refused:  # Pillow reads more files, and reports errors
                index = part[position]
                try:
                    pixels[index] = decode(files[position].data, preprocessing, self._max_pixels)
                except ServerError as error:
                    error.details["image"] = items[index].index
                    errors[index] = error
        if pixels:
            batch[list(pixels)] = stacked(list(pixels.values()), key.input_size, self._device)
        if errors:
            batch = batch[[index for index in range(len(items)) if index not in errors]]
        self._finish()
        prepared = PixelBatch(batch)
        if not errors:
            return [Prepared(item, prepared, row) for row, item in enumerate(items)]
        rows = iter(range(len(batch)))
        return [errors.get(index) or Prepared(item, prepared, next(rows)) for index, item in enumerate(items)]

    def _finish(self) -> None:
        """Waits until the device has done its work."""
        if self._stream is not None:
            self._stream.synchronize()


def _parts(images: Sequence[Pixels | JpegFile]) -> Iterator[tuple[list[int], list[JpegFile]]]:
    """JPEGs that are decoded together, with their indices."""
    indices: list[int] = []
    files: list[JpegFile] = []
    pixels = 0
    for index, image in enumerate(images):
        if isinstance(image, JpegFile):
            size = image.width * image.height
            if files and pixels + size > PART_PIXELS:
                yield indices, files
                indices, files, pixels = [], [], 0
            indices.append(index)
            files.append(image)
            pixels += size
    if files:
        yield indices, files
