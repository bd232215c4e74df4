"""`tome-server explain`: paint what merged in a photo, block by block."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.asked import plain_r
from server.commands.output import check_place
from server.errors import SettingsError
from server.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

HELP = "paint which patches of a photo the model has merged, block by block"
SETTINGS: tuple[str, ...] = ("model", "weights", "tuned", "r", "device", "precision", "threads", "state_dir")
PANEL = 384  # pixels that a panel is wide, at least
LINE, GAP, CAPTION = 2, 12, 36  # pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a PNG: the photo as the model sees it, then painted after some blocks. Patches that have merged "
        "share their mean colour and a line around it; a patch that is still a token of its own keeps its detail."
    )
    parser.add_argument("photo", metavar="PHOTO", help="image file")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="PNG file to write")
    parser.add_argument(
        "--blocks",
        metavar="LIST",
        help="blocks to look behind, counted from 1, like 1,4,8,12 (default: the last of each third, like 4,8,12)",
    )


def run(settings: Settings, args: argparse.Namespace) -> int:
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise SettingsError(f"-o is {output}; the file is a PNG, so its name must end in .png")
    check_place("-o", output)
    r = plain_r(settings)
    try:
        Path(args.photo).open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise SettingsError(f"{args.photo}: {getattr(error, 'strerror', None) or error}") from None

    import torch
    from PIL import Image

    from server.device.explainer import patches
    from server.device.models import load_model
    from server.device.prepared import stacked
    from server.device.runner import Runner
    from server.device.torch_backend import set_threads
    from server.images.photos import read_photo
    from tome_core.visualize import paint, sources

    set_threads(settings.threads)
    spec = settings.specs()[0]
    loaded = load_model(spec, settings.state_dir)
    info = loaded.info
    schedule = info.schedule(r)
    blocks = _blocks(args.blocks, info.num_blocks)
    grid, patch = patches(loaded)
    runner = Runner({info.name: loaded}, settings.device, settings.precision)
    key = info.batch_key(schedule)
    pixels = read_photo(args.photo, info.preprocessing, settings.max_image_pixels)
    batch = stacked([pixels], key.input_size, runner.device)
    answer = ""
    if info.labels:
        (((likeliest,), (score,)),) = runner.top_k(key, batch, 1)
        answer = f"{score:.1%} {info.labels[likeliest]}; "
    found = sources(runner.merged(info.name), batch, schedule, [block - 1 for block in blocks])

    height, width = info.preprocessing.input_size
    in_patches = (0, 0, grid[1] * patch, grid[0] * patch)  # less a rim that fills no patch, which the model ignores
    photo = _enlarged(Image.frombytes("RGB", (width, height), pixels).crop(in_patches))
    image = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(photo.height, photo.width, 3)
    painted = [paint(image.permute(2, 0, 1), source[0], grid, info.num_prefix_tokens, LINE) for source in found]
    counts = info.token_counts(schedule)
    captions = [f"photo: {counts[0]} tokens", *(f"after block {block}: {counts[block]} tokens" for block in blocks)]
    try:
        _side_by_side([photo, *map(_picture, painted)], captions).save(output, "PNG", optimize=True)
    except OSError as error:
        raise SettingsError(f"-o is {args.output}: {error.strerror}") from None
    print(f"{args.photo}: {answer}tokens {counts[0]}, after each block {' '.join(map(str, counts[1:]))}")
    return 0


def _blocks(text: str | None, num_blocks: int) -> list[int]:
    """Reads `1,4,8,12`; by default the last block of each third of the depth."""
    if text is None:
        return sorted({math.ceil(num_blocks * third / 3) for third in (1, 2, 3)})
    numbers = {str(number): number for number in range(1, num_blocks + 1)}
    words = [word.strip() for word in text.split(",")]
    if not set(words) <= set(numbers):
        raise SettingsError(
            f"--blocks is {text!r}; it must list blocks between 1 and {num_blocks}, like 1,{num_blocks}"
        )
    return [numbers[word] for word in words]


def _enlarged(seen: Image) -> Image:
    """By a whole factor, so that every patch stays a square of pixels."""
    from PIL.Image import Resampling

    factor = math.ceil(PANEL / seen.width)
    return seen.resize((seen.width * factor, seen.height * factor), Resampling.BICUBIC)


def _picture(image: Tensor) -> Image:
    """A (3, H, W) uint8 tensor as a picture."""
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _side_by_side(panels: Sequence[Image], captions: Sequence[str]) -> Image:
    """Panels of one size in a row, each with a line of text below."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = panels[0].size
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(CAPTION * 0.6)
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = index * (width + GAP)
        sheet.paste(panel, (left, 0))
        draw.text((left + width // 2, height + CAPTION // 2), caption, "#333", font, anchor="mm")
    return sheet
