"""What decoding costs, known before: never less than it takes, as measured; and what a process may spend on it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.errors import TooLargeError
from server.images.cost import MOST_BLOCK_VISITS, MOST_PARTS, Budget, cost_of
from server.images.preprocessing import Preprocessing
from tests.server.conftest import encode
from tests.server.expensive import many_scans, png, tiff_of_strips

MIB = 1 << 20
MAX_PIXELS = 50_000_000
HALF = (0.5, 0.5, 0.5)
MODEL = Preprocessing((224, 224), (256, 256), "center", "bicubic", HALF, HALF)

TURNED = Image.Exif()
TURNED[0x0112] = 6

FORMATS: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
    "JPEG": (
        ["L", "RGB", "CMYK"],
        [{}, {"progressive": True}, {"exif": TURNED}, {"progressive": True, "exif": TURNED}],
    ),
    "PNG": (["L", "LA", "P", "RGB", "RGBA", "I;16"], [{"compress_level": 1}, {"compress_level": 1, "exif": TURNED}]),
    "WEBP": (["RGB", "RGBA"], [{"method": 0}, {"lossless": True, "quality": 0, "method": 0}, {"exif": TURNED}]),
    "GIF": (["P", "L"], [{}, {"transparency": 3}]),
    "BMP": (["L", "P", "RGB", "RGBA"], [{}]),
    "TIFF": (["L", "RGB", "RGBA", "CMYK", "I;16"], [{}, {"compression": "tiff_lzw"}]),
    "AVIF": (["RGB", "RGBA"], [{"speed": 10}, {"speed": 10, "subsampling": "4:4:4"}]),
}

# Each in a process that was forked before, so that what one left is not there for the next.
MEASURE = """
import contextlib, os, sys
from pathlib import Path
from server.errors import ServerError
from server.images.pillow import decode
from server.images.preprocessing import Preprocessing
from server.memory import give_large_blocks_back
give_large_blocks_back()
half = (0.5, 0.5, 0.5)
model = Preprocessing((224, 224), (256, 256), "center", "bicubic", half, half)
def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) << 10
for file in sorted(Path(sys.argv[1]).iterdir()):
    sys.stdout.flush()
    if os.fork() == 0:
        encoded = file.read_bytes()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        with contextlib.suppress(ServerError):
            decode(encoded, model, 50_000_000)
        print(file.name, resident("VmHWM") - before)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, file
"""


def photo(width: int, height: int, mode: str) -> Image.Image:
    rough = np.random.default_rng(width).integers(0, 256, (height // 8 + 1, width // 8 + 1, 4), dtype=np.uint8)
    image = Image.fromarray(rough).resize((width, height))
    return (
        image.convert("L").convert(mode)
        if mode == "I;16"
        else image
        if mode == "RGBA"
        else image.convert("RGB").convert(mode)
    )


def peaks(files: dict[str, bytes], folder: Path) -> dict[str, int]:
    """Bytes of memory that decoding each takes at most."""
    for name, encoded in files.items():
        (folder / name).write_bytes(encoded)
    said = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return {name: int(size) for name, size in (line.rsplit(" ", 1) for line in said.stdout.splitlines())}


@pytest.mark.parametrize("format", FORMATS)
def test_decoding_takes_no_more_memory_than_is_said_before(format: str, tmp_path: Path) -> None:
    modes, all_options = FORMATS[format]
    dice = random.Random(format)
    files = {}
    for mode in modes:
        for index, options in enumerate(all_options):
            width, height = dice.randint(900, 2600), dice.randint(900, 2600)
            files[f"{mode.replace(';', '')}{index}"] = encode(photo(width, height, mode), format, **options)
    measured = peaks(files, tmp_path)
    assert measured.keys() == files.keys()
    for name, encoded in files.items():
        cost = cost_of(encoded, MODEL, MAX_PIXELS)
        assert measured[name] <= cost.memory, (name, cost)
        # And it is not made up: an image is refused, or waits, for no more than about what it takes.
        assert cost.memory <= 6 * measured[name] + 16 * MIB, (name, measured[name])


def test_files_that_are_made_to_be_large_take_no_more_either(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4000, 4000))
    files = {
        "clear.webp": encode(clear, "WEBP", lossless=True),
        "clear.png": png(4000, 4000, 6, 4),
        "holed.png": encode(Image.new("P", (4000, 4000)), transparency=0),
        "deep.png": encode(Image.new("I;16", (4000, 4000))),
        "deep and holed.png": encode(Image.new("I;16", (4000, 4000)), transparency=0),
        "unended.jpg": encode(photo(4000, 4000, "RGB"), "JPEG")[:-2],
        "unended and progressive.jpg": encode(photo(4000, 4000, "RGB"), "JPEG", progressive=True)[:-2],
        "long.png": png(80, 40_000),
        "empty.gif": encode(Image.new("P", (4000, 4000)), "GIF"),
        "lab.tif": encode(Image.new("LAB", (4000, 4000)), "TIFF", compression="tiff_lzw"),
        "scans.jpg": many_scans(20, 4000),
        "strips.tif": tiff_of_strips(50_000),
    }
    measured = peaks(files, tmp_path)
    assert {name: size <= cost_of(files[name], MODEL, MAX_PIXELS).memory for name, size in measured.items()} == (
        dict.fromkeys(files, True)
    )


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4032, 3024), {}),
        ((4032, 3024), {"exif": TURNED}),
        ((4001, 3003), {}),
        ((6000, 4000), {"progressive": True}),
        ((8000, 6000), {}),
    ],
)
def test_a_usual_photo_is_one_for_the_threads(size: tuple[int, int], options: dict[str, Any]) -> None:
    cost = cost_of(encode(photo(*size, "RGB"), "JPEG", **options), MODEL, MAX_PIXELS)
    assert cost.is_plain and cost.memory <= Budget.of(3 << 30, 1, 2).of_a_thread


def test_more_scans_than_can_be_decoded_in_time_are_refused_at_once() -> None:
    allowed = MOST_BLOCK_VISITS // 250_000
    assert not cost_of(many_scans(allowed, 4000), MODEL, MAX_PIXELS).is_plain
    with pytest.raises(TooLargeError, match=f"has {allowed + 1} scans of 4000 x 4000 .* at most {allowed} are allowed"):
        cost_of(many_scans(allowed + 1, 4000), MODEL, MAX_PIXELS)


def test_more_strips_than_an_image_can_need_are_refused_at_once() -> None:
    assert not cost_of(tiff_of_strips(MOST_PARTS), MODEL, MAX_PIXELS).is_plain
    with pytest.raises(TooLargeError, match=f"has {MOST_PARTS + 1} strips or tiles"):
        cost_of(tiff_of_strips(MOST_PARTS + 1), MODEL, MAX_PIXELS)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_more_pixels_than_are_allowed_are_refused_at_once(format: str) -> None:
    encoded = encode(Image.new("RGB", (100, 50)), format)
    assert cost_of(encoded, MODEL, 5000).memory > 0
    with pytest.raises(TooLargeError, match="has 100 x 50 pixels; at most 4999 are allowed"):
        cost_of(encoded, MODEL, 4999)


def test_what_is_no_image_costs_nothing() -> None:
    assert cost_of(b"hello", MODEL, MAX_PIXELS).memory == cost_of(b"", MODEL, MAX_PIXELS).memory == 0


@given(memory=st.integers(1 << 28, 1 << 42), processes=st.integers(1, 64), threads=st.integers(1, 256))
def test_all_decoders_together_have_a_quarter_of_the_memory(memory: int, processes: int, threads: int) -> None:
    budget = Budget.of(memory, processes, threads)
    assert processes * (threads * budget.of_a_thread + budget.apart) <= memory / 4
    assert budget.apart >= threads * budget.of_a_thread > 0
