"""JPEG files to the pixels that a model wants, on the device, a batch at a time: by nvJPEG, on the CPU by libjpeg."""

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
        """Decodes files together; what it gives to the device may still be at work.

        Args:
            files: The files. They must stay until the device is done.
            preprocessing: Sizes, crop and interpolation of the model.
            batch: Where to: (B, H, W, 3) in uint8, on the device.
            rows: Of each file, where in the batch.

        Returns:
            Indices of files that it refuses, or whose image is not of the size that their header told Pillow.
        """
        ...


@cache
def decoder_on(device: torch.device) -> Decoder:
    """The decoder of a device, which serves one thread at a time; raises whatever is wrong with it."""
    if device.type != "cuda":
        return by_libjpeg
    from server.images.nvjpeg_planes import NvJpegDecoder  # by kernels, for which not every machine has the compiler

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
        # A copy: torch takes no memory that it may not write to, as that of bytes.
        image: Tensor = decode_jpeg(torch.frombuffer(bytearray(file.data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        logger.debug("a JPEG is refused: %s", error)
        return None
    return image if image.shape == (3, file.height, file.width) else None


def engine_decodes(decode: str, device: torch.device) -> bool:
    """Whether the engine decodes JPEG itself; the log says why.

    Args:
        decode: "cpu", "device", or "auto": the device where it is a GPU whose decoder works.
        device: The engine's.

    Raises:
        SettingsError: "device" was asked for, and cannot decode.
    """
    if decode == "cpu" or (decode == "auto" and device.type != "cuda"):
        return False
    refusal = _refusal(device)
    if refusal is None:
        logger.info("JPEGs are decoded by the engine, on %s", device)
        return True
    if decode == "device":
        raise SettingsError(f"--decode device: {device} decodes no JPEG: {refusal}")
    logger.warning("JPEGs are decoded by the HTTP processes, for %s decodes none: %s", device, refusal)
    return False


def simplest_jpeg() -> JpegFile:
    """A small one that any decoder takes, 64 x 48 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(file, "JPEG")
    return JpegFile(file.getvalue(), 64, 48)


def _refusal(device: torch.device) -> str | None:
    """Why a device cannot decode, by trying it."""
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing((32, 32), (32, 32), "center", "bilinear", half, half)
    try:
        batch = torch.zeros(1, 32, 32, 3, dtype=torch.uint8, device=device)
        if decoder_on(device)([simplest_jpeg()], preprocessing, batch, [0]):
            return "its decoder refuses the simplest"
        off = (batch.int().cpu() - torch.tensor([200, 100, 50])).abs().max()
        return None if off <= 4 else "its decoder gives other colours than are in the file"
    except Exception as error:  # a torchvision without decoders, or a device that it has none for
        return (str(error) or type(error).__name__).splitlines()[0]
