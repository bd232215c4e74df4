"""Uploads to images, decoded here or left to an engine that decodes, and on to the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from server import metrics
from server.api.access import Service
from server.api.body import Upload
from server.api.terms import Terms
from server.errors import TooLargeError, UndecodableError, UnsupportedError
from server.images.image import Image
from server.images.pillow import as_it_came
from server.ipc.messages import Answered, Request
from server.types import ModelInfo

T = TypeVar("T")

OF_AN_IMAGE = (UndecodableError, UnsupportedError, TooLargeError)


async def read_images(uploads: Sequence[Upload], info: ModelInfo, service: Service) -> tuple[list[Image], float]:
    """The images of a request, decoded side by side, and the seconds that the slowest took.

    Raises:
        UndecodableError, UnsupportedError, TooLargeError: One of them cannot be decoded; the details say which.
    """
    max_pixels = service.settings.max_image_pixels

    async def read_one(index: int, upload: Upload) -> tuple[Image, float]:
        start = time.perf_counter()
        try:
            image: Image | None = None
            if info.decodes_jpeg:
                image = as_it_came(upload.encoded, info.preprocessing, max_pixels)  # sooner than a thread is asked
            if image is None:
                image = await service.decoders.read(upload.encoded, info.preprocessing, info.decodes_jpeg)
        except OF_AN_IMAGE as error:
            error.details["image"] = index
            raise
        took_s = time.perf_counter() - start
        metrics.DECODE_S.observe(took_s)
        return image, took_s

    if len(uploads) == 1:
        read_all = [await read_one(0, uploads[0])]
    else:
        tasks = [asyncio.ensure_future(read_one(index, upload)) for index, upload in enumerate(uploads)]
        try:
            read_all = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return [image for image, _ in read_all], max(took_s for _, took_s in read_all)


async def read_and_ask(
    kind: Callable[..., Request[T]], uploads: Sequence[Upload], terms: Terms, service: Service
) -> tuple[float, Answered[T]]:
    """Seconds of decoding, and what the engine answers by the deadline.

    Args:
        kind: `Classify` or `Explain`.
        uploads: The images as they came.
        terms: What is asked of each.
        service: Where they are decoded and answered.

    Raises:
        ServerError: What `read_images` and the engine raise; of one image it names the file. DeadlineError.
    """
    try:
        async with terms.in_time():
            images, decode_s = await read_images(uploads, terms.info, service)
            request = kind(model=terms.info.name, images=images, r=terms.r, deadline=terms.deadline, top_k=terms.top_k)
            return decode_s, await service.engine.answer(request)
    except OF_AN_IMAGE as error:
        if "image" in error.details:
            error.details["filename"] = uploads[error.details["image"]].filename
        raise
