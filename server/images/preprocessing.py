"""A model's preprocessing: sizes, crop and interpolation, and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """A model's preprocessing, from its own configuration; sizes in pixels."""

    input_size: tuple[int, int]
    resize_size: tuple[int, int]
    crop_mode: Literal["center", "squash"]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a resized image before the crop; rounds like torchvision."""
        to_height, to_width = self.resize_size
        if self.crop_mode == "squash":
            return to_width, to_height
        short = min(width, height)
        scaled_width, scaled_height = (
            to_height if side == short else int(to_height * side / short) for side in (width, height)
        )
        return scaled_width, scaled_height

    def crop_corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the crop in a resized image, negative if the image is smaller; rounds like torchvision."""
        to_height, to_width = self.input_size
        return round((width - to_width) / 2), round((height - to_height) / 2)
