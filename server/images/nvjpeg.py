"""JPEG files to a model's pixels on the device, a batch at a time: by nvJPEG on a GPU, by libjpeg on the CPU."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from server.errors import SettingsError
from server.images.image import JpegFile
from server.images.preprocessing import Preprocessing
from server.images.resizing import resize

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """Decodes JPEG files of one or three colours on one device."""

    def __call__(
        self, files: Sequence[JpegFile], preprocessing: Preprocessing, batch: Tensor, rows: Sequence[int]
    ) -> list[int]:
        """Decodes files together. The device may still work when it returns.

        Args:
            files: The files. They must stay until the device is done.
            preprocessing: The model's sizes, crop and interpolation.
            batch: The output: (B, H, W, 3) in uint8, on the device.
            rows: The place of each file in the batch.

        Returns:
            Indices of files that it refuses, or whose size differs from their header's by Pillow.
        """
        ...


@cache
def decoder_on(device: torch.device) -> Decoder:
    """The decoder of a device, for one thread at a time; raises its error if it does not work."""
    if device.type != "cuda":
        return by_libjpeg
    from server.images.nvjpeg_planes import NvJpegDecoder  # uses kernels; not every machine has their compiler

    return NvJpegDecoder(device)


def by_libjpeg(
    files: Sequence[JpegFile], preprocessing: Preprocessing, batch: Tensor, rows: Sequence[int]
) -> list[int]:
    """A `Decoder` on the CPU."""
    images = [_decoded(file) for file in files]
    good = [index for index, image in enumerate(images) if image is not None]
    if good:
        batch[[rows[index] for index in good]] = resize([image for image in images if image is not None], preprocessing)
    return [index for index, image in enumerate(images) if image is None]


def _decoded(file: JpegFile) -> Tensor | None:
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        # A copy, because torch wants writable memory, and bytes are not.
        image: Tensor = decode_jpeg(torch.frombuffer(bytearray(file.data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        logger.debug("a JPEG is refused: %s", error)
        return None
    return image if image.shape == (3, file.height, file.width) else None


def engine_decodes(decode: str, device: torch.device) -> bool:
    """Whether the engine decodes JPEG itself. The reason is logged.

    Args:
        decode: "cpu", "device", or "auto": the device if it is a GPU whose decoder works.
        device: The engine's device.

    Raises:
        SettingsError: "device" was requested, and cannot decode.
    """
    if decode == "cpu" or (decode == "auto" and device.type != "cuda"):
        return False
    refusal = _refusal(device)
    if refusal is None:
        logger.info("JPEGs are decoded by the engine, on %s", device)
        return True
    if decode == "device":
        raise SettingsError(f"--decode device: {device} cannot decode JPEG: {refusal}")
    logger.warning("JPEGs are decoded by the HTTP processes, because %s cannot decode them: %s", device, refusal)
    return False


def simplest_jpeg() -> JpegFile:
    """A small JPEG that any decoder accepts, 64 x 48 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(file, "JPEG")
    return JpegFile(file.getvalue(), 64, 48)


def _refusal(device: torch.device) -> str | None:
    """The reason why a device cannot decode, found by trying; None if it can."""
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing((32, 32), (32, 32), "center", "bilinear", half, half)
    try:
        batch = torch.zeros(1, 32, 32, 3, dtype=torch.uint8, device=device)
        if decoder_on(device)([simplest_jpeg()], preprocessing, batch, [0]):
            return "its decoder refuses the simplest file"
        off = (batch.int().cpu() - torch.tensor([200, 100, 50])).abs().max()
        return None if off <= 4 else "its decoder returns wrong colours"
    except Exception as error:  # a torchvision without decoders, or without one for this device
        return (str(error) or type(error).__name__).splitlines()[0]
