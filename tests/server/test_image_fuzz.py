"""Mutated images of all formats: pixels or an answer to the client, and a decoder that lives.

`python -m tests.server.test_image_fuzz COUNT SEED` tries as many as one likes; the test tries some in a process of its
own, because it is C that would break.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import warnings
from typing import Any

from PIL import Image

from server.errors import ServerError
from server.images.pillow import FORMATS, decode
from server.images.preprocessing import Preprocessing
from tests.server.conftest import encode

MAX_PIXELS = 1_000_000
MOST_MEMORY = 1 << 30  # of address space, beyond what the libraries take
WANTS = Preprocessing((32, 32), (32, 32), "center", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MAGIC = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"]
MAGIC += [b"\xff\xd8\xff", b"\xff\xd9", b"\xff\xda", b"\xff\xc2", b"\xff\xdd\0\4\0\1", b"IHDR", b"IDAT", b"IEND"]
MAGIC += [b"tRNS", b"eXIf", b"Exif\0\0", b"II*\0", b"MM\0*", b"II+\0"]


def whole_files() -> dict[str, list[bytes]]:
    """Some of each format."""
    image, exif = Image.frombytes("RGB", (96, 80), random.Random(0).randbytes(96 * 80 * 3)), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(9)]}
    files = {
        "JPEG": [
            encode(image, "JPEG"), encode(image, "JPEG", progressive=True, exif=exif), encode(image, "JPEG")[:-2],
            encode(image.convert("L"), "JPEG"), encode(image.convert("CMYK"), "JPEG"),
            encode(image, "JPEG", subsampling=0, restart_marker_blocks=2),
        ],
        "PNG": [
            encode(image), encode(image.convert("P")), encode(image.convert("RGBA")), encode(image, **frames),
            encode(image.convert("L"), transparency=5), encode(Image.new("I;16", (40, 30), 700)),
            encode(image.convert("1")), encode(image, exif=exif, icc_profile=b"x" * 200, dpi=(72, 72)),
        ],
        "WEBP": [
            encode(image, "WEBP"), encode(image, "WEBP", lossless=True), encode(image, "WEBP", **frames),
            encode(image.convert("RGBA"), "WEBP", exif=exif),
        ],
        "GIF": [
            encode(image.convert("P"), "GIF"), encode(image.convert("P"), "GIF", transparency=3, interlace=1),
            encode(image, "GIF", **frames),
        ],
        "TIFF": [
            *(encode(image, "TIFF", compression=how) for how in (None, "tiff_lzw", "jpeg", "packbits", "zstd")),
            *(encode(image.convert("1"), "TIFF", compression=how) for how in ("group3", "group4", "tiff_ccitt")),
            encode(image.convert("CMYK"), "TIFF"), encode(Image.new("I;16", (20, 20)), "TIFF"),
            encode(image, "TIFF", compression="tiff_adobe_deflate", exif=exif), encode(image, "TIFF", **frames),
            encode(image.convert("P"), "TIFF"), encode(image.convert("RGBA"), "TIFF", big_tiff=True),
        ],
        "BMP": [encode(image.convert(mode), "BMP") for mode in ("RGB", "P", "1", "RGBA", "L")],
        "AVIF": [
            encode(image, "AVIF"), encode(image.convert("RGBA"), "AVIF", exif=exif), encode(image, "AVIF", **frames),
        ],
    }  # fmt: skip
    return {format: made for format, made in files.items() if format in FORMATS}


def mutated(file: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A file with one to twenty changes, most of them near its beginning."""
    changed = bytearray(file)
    for _ in range(chance.choice([1, 1, 2, 4, 8, 20])):
        if not changed:
            break
        at = chance.randrange(len(changed))
        if chance.random() < 0.5:
            at = chance.randrange(min(len(changed), 200))
        kind = chance.choice("bit bit magic magic more less other cut number twice".split())
        if kind == "bit":
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == "magic":
            magic = chance.choice(MAGIC)
            changed[at : at + len(magic)] = magic
        elif kind == "more":
            changed[at:at] = chance.choice(MAGIC) * chance.randrange(1, 4)
        elif kind == "less":
            del changed[at : at + chance.choice([1, 2, 4, 50, 500])]
        elif kind == "other":
            other = chance.choice(others)
            start = chance.randrange(len(other))
            changed[at : at + 100] = other[start : start + chance.randrange(1, 400)]
        elif kind == "cut":
            del changed[at:]
        elif kind == "number":
            changed[at : at + 4] = chance.randrange(1 << 32).to_bytes(4, chance.choice(["big", "little"]))
        else:
            changed[at:at] = changed[at : at + chance.randrange(1, 2000)]
    return bytes(changed)


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Decodes so many mutated files, with little memory for the whole process; gives how many ended how.

    Raises:
        Exception: Whatever is no answer to a client. The file is among its notes.
    """
    chance, files = random.Random(seed), whole_files()
    everything = [file for made in files.values() for file in made]
    with open("/proc/self/statm") as pages:
        most = int(pages.read().split()[0]) * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    ended: dict[str, int] = {}
    for _ in range(count):
        made = files[chance.choice(list(files))]
        file = mutated(chance.choice(made), made if chance.random() < 0.9 else everything, chance)
        try:
            decode(file, WANTS, MAX_PIXELS)
            how = "pixels"
        except ServerError as error:
            how = str(error.status)
        except BaseException as error:
            error.add_note(repr(file))
            raise
        ended[how] = ended.get(how, 0) + 1
    return ended


def test_no_mutated_file_ends_the_decoder() -> None:
    for seed in (1, 2):
        done = subprocess.run(
            [sys.executable, "-m", "tests.server.test_image_fuzz", "500", str(seed)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        ended = dict(line.split() for line in done.stdout.splitlines())
        assert set(ended) <= {"pixels", "400", "413", "415"} and int(ended["pixels"]) > 50, ended


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for how, times in fuzz(int(sys.argv[1]), int(sys.argv[2])).items():
        print(how, times)
