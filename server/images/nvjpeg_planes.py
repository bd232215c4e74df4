"""JPEG files to a model's pixels on a GPU: nvJPEG writes the planes of a batch, kernels turn them into pixels.

This takes a handful of torch calls for any number of files. For each file, Python only has nvJPEG read the header; the
rest is computed for all files together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.images import resize_kernel as table
from server.images.image import JpegFile
from server.images.nvjpeg_library import NvJpeg
from server.images.preprocessing import Preprocessing
from tome_core.kernels.launch import missing_on

_ALIGNED = 16  # bytes, and lines too, so that every plane begins at an aligned address


class NvJpegDecoder:
    """A `Decoder` on a GPU, in torch's stream of the calling thread.

    Args:
        device: The GPU.

    Raises:
        OSError: nvJPEG or the kernels do not work there; the message says why.
    """

    def __init__(self, device: torch.device) -> None:
        if missing := missing_on(device):
            raise OSError(missing)
        self._device = device
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # nvJPEG needs a CUDA context
            self._library = NvJpeg()

    def __call__(
        self, files: Sequence[JpegFile], preprocessing: Preprocessing, batch: Tensor, rows: Sequence[int]
    ) -> list[int]:
        """See `Decoder`."""
        with torch.cuda.device(self._device):
            encoded = [file.data for file in files]
            sizes = self._library.sizes(encoded)
            known = is_known(sizes, [(file.width, file.height) for file in files])
            sizes *= known[:, None, None]
            images, length = laid_out(sizes)
            planes = torch.empty(length, dtype=torch.uint8, device=self._device)
            images[:, table.LUMA : table.CR + 1] += planes.data_ptr()
            images[:, table.ROW] = rows

            (indices,) = known.nonzero()
            stream = torch.cuda.current_stream().cuda_stream
            theirs = [encoded[index] for index in indices.tolist()]
            refused = self._library.decode(theirs, sizes[indices], _destinations(images[indices]), stream)
            known[indices[refused]] = False
            if known.any():
                table.resize(images[known], preprocessing, batch)
            return (~known).nonzero()[0].tolist()


def is_known(sizes: NDArray[np.int32], told: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Selects the files for which the kernel does what libjpeg does.

    Args:
        sizes: (N, 2, 4): widths and heights of their components.
        told: Width and height of each file, by its header.

    Returns:
        (N,): True for one colour, and for three of which two have the full or half the width and height. False for a
        size other than the header's, and for tiny images, for which libjpeg has other rules.
    """
    full, first, second = sizes[:, :, 0], sizes[:, :, 1], sizes[:, :, 2]
    halved = first < full
    fits = (first == np.where(halved, (full + 1) // 2, full)) & (first == second)
    tiny = (first[:, 0] <= 2) & halved.any(1)
    is_grey = (sizes[:, :, 1:] == 0).all((1, 2))
    known = is_grey | (fits.all(1) & ~tiny & (sizes[:, :, 3] == 0).all(1))
    known &= (full == np.array(told)).all(1) & (full[:, 1] > 1)
    return np.asarray(known, np.bool_)


def laid_out(sizes: NDArray[np.int32]) -> tuple[NDArray[np.int64], int]:
    """Places the planes of images in one piece of memory.

    Args:
        sizes: (N, 2, 4): widths and heights of their components; zeros take no memory.

    Returns:
        Rows of `resize_kernel`'s table, with addresses from the beginning of the memory, and its length.
    """
    widths, heights = sizes[:, 0, :3].astype(np.int64), sizes[:, 1, :3].astype(np.int64)
    lines = -(-widths // _ALIGNED) * _ALIGNED
    ends = (lines * (-(-heights // _ALIGNED) * _ALIGNED)).reshape(-1).cumsum()
    starts = np.concatenate([[0], ends[:-1]]).reshape(-1, 3)
    is_grey = widths[:, 1] == 0
    # The kernel reads some colour planes in any case.
    colours = np.where(is_grey, 0, 1), np.where(is_grey, 0, 2)
    each = np.arange(len(sizes))
    images = np.zeros((len(sizes), table.GIVEN), np.int64)
    images[:, table.LUMA] = starts[:, 0]
    images[:, table.CB], images[:, table.CR] = starts[each, colours[0]], starts[each, colours[1]]
    images[:, table.LINE], images[:, table.COLOUR_LINE] = lines[:, 0], lines[each, colours[0]]
    images[:, table.WIDTH], images[:, table.HEIGHT] = widths[:, 0], heights[:, 0]
    images[:, table.COLOUR_WIDTH] = widths[each, colours[0]]
    images[:, table.COLOUR_HEIGHT] = heights[each, colours[0]]
    images[:, table.HALF_WIDTH] = images[:, table.COLOUR_WIDTH] < widths[:, 0]
    images[:, table.HALF_HEIGHT] = images[:, table.COLOUR_HEIGHT] < heights[:, 0]
    images[:, table.IS_GREY] = is_grey
    return images, int(ends[-1])


def _destinations(images: NDArray[np.int64]) -> NDArray[np.uint64]:
    """nvJPEG's arguments for each image: the addresses of its planes, and the distances of their lines."""
    coloured = images[:, table.IS_GREY] == 0
    written = np.zeros((len(images), 8), np.uint64)
    written[:, 0], written[:, 4] = images[:, table.LUMA], images[:, table.LINE]
    written[:, 1], written[:, 2] = images[:, table.CB] * coloured, images[:, table.CR] * coloured
    written[:, 5] = written[:, 6] = images[:, table.COLOUR_LINE] * coloured
    return written
