"""The kernel that cuts images against plain PyTorch, and against the convolution that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.core.operands import DEVICE, DTYPES, agree, random
from tome_core.kernels import operators, reference

pytestmark = pytest.mark.usefixtures("by_kernels")


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("rows", [1, 5])
def test_images(patch: int, rows: int) -> None:
    images = random(3, 3, rows * patch, 4 * patch)
    assert torch.equal(operators.cut(images, patch, torch.float32), reference.cut(images, patch, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [14, 16])
def test_pixels(patch: int, dtype: torch.dtype) -> None:
    """Exactly, for bytes less 128 are whole numbers that half precision has."""
    pixels = torch.randint(0, 256, (3, 5 * patch, 4 * patch, 3), dtype=torch.uint8).to(DEVICE)
    assert torch.equal(operators.cut(pixels, patch, dtype), reference.cut(pixels, patch, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_in_half_precision(dtype: torch.dtype) -> None:
    images = random(2, 3, 42, 56, dtype=dtype)
    assert torch.equal(operators.cut(images, 14, dtype), reference.cut(images, 14, dtype))
    wide = random(2, 3, 42, 56)
    agree(operators.cut(wide, 14, dtype), reference.cut(wide, 14, torch.float32))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    images = random(2, channels, 42, 56)
    assert torch.equal(operators.cut(images, 14, torch.float32), reference.cut(images, 14, torch.float32))
    pixels = torch.randint(0, 256, (2, 42, 56, channels), dtype=torch.uint8).to(DEVICE)
    assert torch.equal(operators.cut(pixels, 14, torch.float32), reference.cut(pixels, 14, torch.float32))


def test_rows_times_weights_are_the_patch_embedding() -> None:
    images, weight = random(2, 3, 42, 56), random(10, 3, 14, 14)
    rows = operators.cut(images, 14, torch.float32)
    assert rows.shape == (2, 12, 592) and (rows[..., 588:] == 0).all()
    wanted = F.conv2d(images.double(), weight.double(), stride=14).flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows[..., :588].double() @ weight.double().flatten(1).t(), wanted)
