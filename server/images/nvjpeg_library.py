"""NVIDIA's decoder by ctypes: JPEG files to planes of luminance and colours, as they are coded.

torchvision's own call gives RGB only. For it, nvJPEG repeats every colour over two by two pixels, where libjpeg
interpolates. The planes before that step equal libjpeg's, bit by bit if the GPU's decoding engine makes them. The
library is torchvision's: its symbols are found through the extension that is linked to it.

Calls that return at once keep Python's interpreter lock. If they released it, each could wait 5 ms to get it back.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_PLANES = 1  # NVJPEG_OUTPUT_YUV: each component in its own size
_DEFAULT, _ENGINE = 0, 3  # NVJPEG_BACKEND_DEFAULT, NVJPEG_BACKEND_HARDWARE
_ARCH_MISMATCH = 7
_MOST_COMPONENTS = 4
_BASELINE = struct.Struct(">HHBHH")  # the start of a frame: mark, length, bits, height and width

AT_ONCE = 3
"""Threads that call nvJPEG: it keeps a thread busy with one image after the other, with any decoder."""
LEAST = 16
"""Fewest files for another thread."""

_pointer, _int, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, list[Any]] = {
    "nvjpegCreateEx": [_int, _pointer, _pointer, ctypes.c_uint, _pointer],
    "nvjpegJpegStateCreate": [_pointer, _pointer],
    "nvjpegJpegStreamCreate": [_pointer, _pointer],
    "nvjpegGetImageInfo": [_pointer, ctypes.c_char_p, _size, _pointer, _pointer, _pointer, _pointer],
    "nvjpegJpegStreamParseHeader": [_pointer, ctypes.c_char_p, _size, _pointer],
    "nvjpegDecodeBatchedSupported": [_pointer, _pointer, _pointer],
    "nvjpegDecodeBatchedInitialize": [_pointer, _pointer, _int, _int, _int],
    "nvjpegDecodeBatched": [_pointer] * 6,
    "nvjpegDecode": [_pointer, _pointer, ctypes.c_char_p, _size, _int, _pointer, _pointer],
}


class NvJpeg:
    """nvJPEG on the current GPU.

    Raises:
        OSError: There is no such library, or it does not work here; the message says so.
    """

    def __init__(self) -> None:
        import torchvision.io  # noqa: F401 - loads the extension

        path = next((path for path in torch.ops.loaded_libraries if "image" in path.rsplit("/", 1)[-1]), None)
        if path is None:
            raise OSError("torchvision has no image extension")
        self._quick, long = ctypes.PyDLL(path), ctypes.CDLL(path)
        for library in (self._quick, long):
            for name, arguments in _SIGNATURES.items():
                try:
                    getattr(library, name).argtypes = arguments
                except AttributeError:
                    raise OSError("torchvision was built without nvJPEG") from None
        device = torch.cuda.current_device()
        self._threads = ThreadPoolExecutor(AT_ONCE, "nvjpeg", lambda: torch.cuda.set_device(device))
        self._workers = [_Worker(self._quick, long) for _ in range(AT_ONCE)]

    def sizes(self, files: Sequence[bytes]) -> NDArray[np.int32]:
        """Reads the sizes of components from the headers; nvJPEG will write these sizes.

        Returns:
            (N, 2, 4): widths and heights of each file's components; zeros for missing components and for a file that
            nvJPEG refuses.
        """
        sizes = np.zeros((len(files), 2, _MOST_COMPONENTS), np.int32)
        said, handle, ask = (_int * 2)(), self._workers[0].handle, self._quick.nvjpegGetImageInfo
        count, sampling, at = ctypes.addressof(said), ctypes.addressof(said) + 4, sizes.ctypes.data
        refused = []
        for index, file in enumerate(files):
            if ask(handle, file, len(file), count, sampling, at, at + 16):
                refused.append(index)
            at += 32
        sizes[refused] = 0
        return sizes

    def decode(
        self, files: Sequence[bytes], sizes: NDArray[np.int32], images: NDArray[np.uint64], stream: int
    ) -> list[int]:
        """Decodes files.

        Args:
            files: The files; they must stay until the stream is done.
            sizes: Their result of `sizes`.
            images: (N, 8): the addresses of each file's four planes, and the distances of their lines.
            stream: The CUDA stream.

        Returns:
            Indices of the files that nvJPEG refuses.
        """
        count = min(len(self._workers), -(-len(files) // LEAST))
        shares = [
            self._threads.submit(worker.decode, files[start::count], sizes[start::count], images[start::count], stream)
            for start, worker in enumerate(self._workers[:count])
        ]
        return sorted(start + count * index for start, share in enumerate(shares) for index in share.result())


class _Worker:
    """The nvJPEG state of one thread.

    Attributes:
        handle: nvJPEG's handle, which any thread may use.
    """

    def __init__(self, quick: ctypes.PyDLL, long: ctypes.CDLL) -> None:
        self._quick, self._long = quick, long
        self.handle = self._opened(_DEFAULT)
        assert self.handle is not None
        self._state = self._made("nvjpegJpegStateCreate", self.handle)
        self._engine = self._opened(_ENGINE)
        if self._engine is not None:
            self._engine_state = self._made("nvjpegJpegStateCreate", self._engine)
            self._header = self._made("nvjpegJpegStreamCreate", self._engine)

    def _opened(self, backend: int) -> ctypes.c_void_p | None:
        """Opens a handle; None if the GPU has no JPEG engine."""
        handle = ctypes.c_void_p()
        status = self._long.nvjpegCreateEx(backend, None, None, 0, ctypes.byref(handle))
        if backend == _ENGINE and status == _ARCH_MISMATCH:
            return None
        if status:
            raise OSError(f"nvjpegCreateEx gives status {status}")
        return handle

    def _made(self, function: str, handle: ctypes.c_void_p) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        if status := getattr(self._long, function)(handle, ctypes.byref(made)):
            raise OSError(f"{function} gives status {status}")
        return made

    def decode(
        self, files: Sequence[bytes], sizes: NDArray[np.int32], images: NDArray[np.uint64], stream: int
    ) -> list[int]:
        """See `NvJpeg.decode`. Decodes the engine's files together, and all others one by one."""
        batch = self._look_baseline(files, sizes) if self._engine is not None else []
        if batch and not self._decode_batch([files[index] for index in batch], images[batch], stream):
            batch = [index for index in batch if self._is_for_the_engine(files[index])]
            if batch and not self._decode_batch([files[index] for index in batch], images[batch], stream):
                batch = []
        alone = sorted(set(range(len(files))) - set(batch))
        return [index for index in alone if not self._decode_one(files[index], images[index], stream)]

    def _look_baseline(self, files: Sequence[bytes], sizes: NDArray[np.int32]) -> list[int]:
        """Files with a frame that the engine decodes. The engine itself refuses other unsupported features."""
        lengths = 8 + 3 * (sizes[:, 0] > 0).sum(1)
        facts = np.column_stack([lengths, sizes[:, :, 0]]).tolist()
        return [
            index
            for index, (length, width, height) in enumerate(facts)
            if files[index].find(_BASELINE.pack(0xFFC0, length, 8, height, width)) > 0
        ]

    def _is_for_the_engine(self, file: bytes) -> bool:
        refuses = ctypes.c_int(1)
        return not (
            self._quick.nvjpegJpegStreamParseHeader(self._engine, file, len(file), self._header)
            or self._quick.nvjpegDecodeBatchedSupported(self._engine, self._header, ctypes.byref(refuses))
            or refuses.value
        )

    def _decode_batch(self, files: Sequence[bytes], images: NDArray[np.uint64], stream: int) -> bool:
        count, engine = len(files), (self._engine, self._engine_state)
        return not (
            self._long.nvjpegDecodeBatchedInitialize(*engine, count, 1, _PLANES)
            or self._long.nvjpegDecodeBatched(
                *engine,
                (ctypes.c_char_p * count)(*files),
                (ctypes.c_size_t * count)(*map(len, files)),
                images.ctypes.data,
                stream,
            )
        )

    def _decode_one(self, file: bytes, image: NDArray[np.uint64], stream: int) -> bool:
        return not self._long.nvjpegDecode(
            self.handle, self._state, file, len(file), _PLANES, np.ascontiguousarray(image).ctypes.data, stream
        )
