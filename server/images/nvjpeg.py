"""JPEG files to images on the device, a batch at a time: nvJPEG on a GPU, libjpeg on the CPU, both by torchvision."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from server.device.fitting import is_out_of_memory
from server.settings import SettingsError

logger = logging.getLogger(__name__)


def decode_jpegs(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """Decodes JPEG files together.

    Args:
        files: Whole files, of one or three colours.
        device: Where to; the device that decodes.

    Returns:
        For each file its image (3, H, W) in uint8, on the device, or None where the decoder refuses it.
    """
    # One copy of all: torch takes no memory that it may not write to, as that of bytes.
    packed = torch.frombuffer(bytearray().join(files), dtype=torch.uint8)
    return _decoded(packed.split([len(file) for file in files]), device)


def _decoded(files: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """A batch of which one file is refused gives nothing at all: then its halves are tried."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return list(decode_jpeg(list(files), ImageReadMode.RGB, device))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        logger.debug("%d JPEGs are refused: %s", len(files), error)
    if len(files) == 1:
        return [None]
    half = len(files) // 2
    return _decoded(files[:half], device) + _decoded(files[half:], device)


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


def simplest_jpeg() -> bytes:
    """A small one that any decoder takes, 64 x 48 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 100, 50)).save(file, "JPEG")
    return file.getvalue()


def _refusal(device: torch.device) -> str | None:
    """Why a device cannot decode, by trying it."""
    try:
        (image,) = decode_jpegs([simplest_jpeg()], device)
        if image is None or image.shape != (3, 48, 64) or image.device.type != device.type:
            return "torchvision's decoder refuses the simplest"
    except Exception as error:  # a torchvision without decoders, or a device that it has none for
        return str(error).splitlines()[0]
    return None
