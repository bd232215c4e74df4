"""Turns uploads into images, decoded here or by the engine, and sends them to the engine."""

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
from server.images.image import Image, Pixels
from server.images.pillow import as_it_came
from server.ipc.messages import Answered, Request
from server.tracing.context import current_span
from server.types import ModelInfo

T = TypeVar("T")

Sent = Upload | Pixels
"""An image as the client sent it: a file, or preprocessed pixels."""

OF_AN_IMAGE = (UndecodableError, UnsupportedError, TooLargeError)


async def read_images(sent: Sequence[Sent], info: ModelInfo, service: Service) -> tuple[list[Image], float]:
    """Decodes the images of a request in parallel; also returns the seconds of the slowest.

    Raises:
        UndecodableError, UnsupportedError, TooLargeError: An image cannot be decoded; the details name it.
    """
    max_pixels, span = service.settings.max_image_pixels, current_span()

    async def read_one(index: int, upload: Sent) -> tuple[Image, float]:
        if isinstance(upload, Pixels):
            return upload, 0.0
        start = time.monotonic()
        try:
            image: Image | None = None
            if info.decodes_jpeg:
                image = as_it_came(upload.encoded, info.preprocessing, max_pixels)  # faster than a thread
            if image is None:
                image = await service.decoders.read(upload.encoded, info.preprocessing, info.decodes_jpeg)
        except OF_AN_IMAGE as error:
            error.details["image"] = index
            if span is not None:
                span.stage("decoding", start, error, {"tome.image": index})
            raise
        took_s = time.monotonic() - start
        metrics.DECODE_S.observe(took_s)
        if span is not None:
            span.stage("decoding", start, attributes={"tome.image": index})
        return image, took_s

    if len(sent) == 1:
        read_all = [await read_one(0, sent[0])]
    else:
        tasks = [asyncio.ensure_future(read_one(index, upload)) for index, upload in enumerate(sent)]
        try:
            read_all = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return [image for image, _ in read_all], max(took_s for _, took_s in read_all)


async def read_and_ask(
    make: Callable[[Terms, list[Image]], Request[T]], sent: Sequence[Sent], terms: Terms, service: Service
) -> tuple[float, Answered[T]]:
    """Seconds of decoding, and the engine's answer by the deadline.

    Args:
        make: Makes the engine's request.
        sent: The images as the client sent them.
        terms: The terms of the request.
        service: Decodes and answers.

    Raises:
        ServerError: Errors of `read_images`, which name the file, and of the engine. DeadlineError.
    """
    try:
        async with terms.in_time():
            images, decode_s = await read_images(sent, terms.info, service)
            return decode_s, await service.engine.answer(make(terms, images))
    except OF_AN_IMAGE as error:
        if "image" in error.details:
            upload = sent[error.details["image"]]
            error.details["filename"] = upload.filename if isinstance(upload, Upload) else None
        raise
