"""TIFF: of every kind that is read the pixels are those of the samples; every other kind is refused by its name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from server.errors import ServerError, TooLargeError, UndecodableError, UnsupportedError
from server.images.pillow import decode
from server.images.preprocessing import Preprocessing

MAX_PIXELS = 100_000
Array = NDArray[Any]


def decoded(encoded: bytes, width: int, height: int) -> Array:
    """The pixels as the service decodes them, not resized."""
    size, half = (height, width), (0.5, 0.5, 0.5)
    wants = Preprocessing(size, size, "squash", "bilinear", half, half)
    return np.frombuffer(decode(encoded, wants, MAX_PIXELS), np.uint8).reshape(height, width, 3).astype(int)


def by_tifffile(data: Array, **options: Any) -> bytes:
    written = io.BytesIO()
    tifffile.imwrite(written, data, metadata=None, **options)
    return written.getvalue()


@dataclass(frozen=True)
class Kind:
    """What the samples of a pixel are."""

    photometric: str
    bits: int
    extra: tuple[str, ...] = ()

    @property
    def colours(self) -> int:
        return {"rgb": 3, "separated": 4, "ycbcr": 3}.get(self.photometric, 1)

    @property
    def alpha(self) -> str | None:
        return self.extra[0] if self.extra and self.extra[0] != "unspecified" else None


ALPHAS = ("unspecified", "assocalpha", "unassalpha")
KINDS = [Kind(grey, bits) for grey in ("minisblack", "miniswhite") for bits in (8, 16)]
KINDS += [Kind("minisblack", 8, (extra,)) for extra in ALPHAS]
KINDS += [Kind("rgb", bits) for bits in (8, 16)]
KINDS += [Kind("rgb", bits, (extra,)) for bits in (8, 16) for extra in ALPHAS]
KINDS += [Kind("rgb", 8, (extra, *more)) for extra in ALPHAS for more in (("unspecified",), ("unspecified",) * 2)]
KINDS += [Kind("palette", 8), Kind("separated", 8), Kind("separated", 16), Kind("ycbcr", 8)]
KINDS += [Kind("separated", 8, ("unspecified",)), Kind("separated", 8, ("unspecified",) * 2)]

COMPRESSIONS = [None, "lzw", "adobe_deflate", "deflate", "packbits", "lzma", "zstd"]
PREDICTED = ("lzw", "adobe_deflate", "deflate", "lzma", "zstd")


def shown(samples: Array, kind: Kind, palette: Array) -> Array:
    """Samples as 8-bit RGB over white."""
    if kind.photometric == "palette":
        return np.asarray(palette.T[samples[..., 0]] >> 8)
    values = samples * 255 // ((1 << kind.bits) - 1) if kind.bits < 8 else samples >> kind.bits - 8
    colour = values[..., : kind.colours].astype(float)
    if kind.photometric == "miniswhite":
        colour = 255 - colour
    if kind.photometric == "separated":
        colour = (255 - colour[..., :3]) * (255 - colour[..., 3:]) / 255
    if kind.photometric == "ycbcr":
        y, cb, cr = colour[..., 0], colour[..., 1] - 128, colour[..., 2] - 128
        colour = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)
    if kind.alpha:
        alpha = values[..., kind.colours, None]
        colour = colour * (alpha / 255 if kind.alpha == "unassalpha" else 1) + 255 - alpha
    return np.broadcast_to(colour, (*colour.shape[:2], 3))


def random_samples(chance: np.random.Generator, width: int, height: int, kind: Kind) -> Array:
    samples = chance.integers(0, 1 << kind.bits, (height, width, kind.colours + len(kind.extra)))
    if kind.alpha == "assocalpha":
        samples[..., : kind.colours] = np.minimum(samples[..., : kind.colours], samples[..., kind.colours, None])
    return samples


@st.composite
def whole_bytes(draw: st.DrawFn) -> tuple[Kind, bytes, Array]:
    """A kind of 8 or 16 bits a sample, a file of it by tifffile, and the pixels that are to come out."""
    kind = draw(st.sampled_from(KINDS))
    width, height = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    samples = random_samples(chance, width, height, kind)
    palette = chance.integers(0, 1 << 16, (3, 256))
    options: dict[str, Any] = {"photometric": kind.photometric, "extrasamples": kind.extra or None}
    order = options["byteorder"] = draw(st.sampled_from("<>"))
    options["bigtiff"] = order == "<" and draw(st.booleans())
    compression = options["compression"] = draw(st.sampled_from(COMPRESSIONS))
    options["predictor"] = compression in PREDICTED and draw(st.booleans())
    if kind.photometric == "palette":
        options["colormap"] = palette.astype(np.uint16)
    if kind.photometric == "ycbcr":
        options["subsampling"] = (1, 1)
    if draw(st.booleans()):
        options["tile"] = (16 * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 3)))
    elif compression:
        options["rowsperstrip"] = draw(st.integers(1, height))
    data: Array = samples.astype(np.uint8 if kind.bits == 8 else f"{order}u2")
    can_be_planes = kind.alpha is None or (kind.photometric == "rgb" and len(kind.extra) == 1)
    if samples.shape[-1] == 1:
        data = data[..., 0]
    elif can_be_planes and draw(st.booleans()):
        data, options["planarconfig"] = np.moveaxis(data, -1, 0), "separate"
    else:
        options["planarconfig"] = "contig"
    return kind, by_tifffile(data, **options), shown(samples, kind, palette)


@settings(max_examples=250)
@given(file=whole_bytes())
def test_of_8_and_16_bits_the_pixels_are_right(file: tuple[Kind, bytes, Array]) -> None:
    kind, encoded, wanted = file
    is_exact = kind.alpha is None and kind.photometric not in ("separated", "ycbcr")
    got = decoded(encoded, wanted.shape[1], wanted.shape[0])
    assert abs(got - wanted).max() <= (0 if is_exact else 2)


PHOTOMETRIC = {"miniswhite": 0, "minisblack": 1, "rgb": 2, "palette": 3}
Tags = Mapping[int, tuple[str, Sequence[int]]]


def tiff(tags: Tags, strips: Sequence[bytes], order: str = "<") -> bytes:
    """A file by hand: its header, its strips, its directory.

    Args:
        tags: The values of each by its number, and what they are as `struct` writes it.
        strips: What tags 273 and 279 tell of.
        order: Of bytes.
    """
    types = {"B": 1, "H": 3, "I": 4, "b": 6, "h": 8, "f": 11}
    body = b"".join(strips)
    body += bytes(len(body) % 2)
    starts = [8 + sum(map(len, strips[:index])) for index in range(len(strips))]
    tags = {**tags, 273: ("I", starts), 279: ("I", [len(strip) for strip in strips])}
    directory = struct.pack(order + "H", len(tags))
    behind, after = b"", 8 + len(body) + 2 + 12 * len(tags) + 4
    for number, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        field = packed.ljust(4, b"\0")
        if len(packed) > 4:
            field = struct.pack(order + "I", after + len(behind))
            behind += packed + bytes(len(packed) % 2)
        directory += struct.pack(order + "HHI", number, types[kind], len(values)) + field
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "I", 8 + len(body)) + body + directory + bytes(4) + behind


def reversed_bits(content: bytes) -> bytes:
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in content)


def packed_rows(samples: Array, bits: int) -> list[bytes]:
    """Rows of samples, bit after bit, each padded to whole bytes."""
    places = np.arange(bits)[::-1]
    return [np.packbits((row[:, None] >> places & 1).ravel()).tobytes() for row in samples]


PACKERS: dict[int, Callable[[bytes], bytes | bytearray]] = {
    1: bytes,
    5: imagecodecs.lzw_encode,
    8: zlib.compress,
    32773: imagecodecs.packbits_encode,
}


@st.composite
def packed_bits(draw: st.DrawFn) -> tuple[bytes, Array]:
    """A file of samples that are no whole bytes, or of bits in the other order, and the pixels that are to come out."""
    kind = Kind(draw(st.sampled_from(["minisblack", "miniswhite"])), draw(st.sampled_from([1, 2, 4, 8, 12, 16])))
    if draw(st.booleans()):
        kind = Kind("palette", draw(st.sampled_from([1, 2, 4, 8])))
    width, height = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    samples = random_samples(chance, width, height, kind)
    order, compression = draw(st.sampled_from("<>")), draw(st.sampled_from(sorted(PACKERS)))
    fill_order = draw(st.sampled_from([1, 2])) if compression == 1 and kind.bits <= 8 else 1
    rows = packed_rows(samples[..., 0], kind.bits)
    if kind.bits == 16:
        rows = [row.astype(f"{order}u2").tobytes() for row in samples[..., 0]]
    each = draw(st.integers(1, height))
    strips = [bytes(PACKERS[compression](b"".join(rows[at : at + each]))) for at in range(0, height, each)]
    if fill_order == 2:
        strips = [reversed_bits(strip) for strip in strips]
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [kind.bits]), 259: ("H", [compression]),
        262: ("H", [PHOTOMETRIC[kind.photometric]]), 266: ("H", [fill_order]), 277: ("H", [1]), 278: ("I", [each]),
    }  # fmt: skip
    if draw(st.booleans()):
        tags[284] = ("H", [2])  # planes, of which there is one
    if draw(st.booleans()):
        tags[339] = ("H", [draw(st.sampled_from([1, 4]))])
    palette = chance.integers(0, 1 << 16, (3, 1 << kind.bits))
    palette[0, 0] |= 1 << 15
    if kind.photometric == "palette":
        is_in_bytes = draw(st.booleans())
        tags[320] = ("H", (palette >> 8 if is_in_bytes else palette).ravel().tolist())
    return tiff(tags, strips, order), shown(samples, kind, palette)


@settings(max_examples=250)
@given(file=packed_bits())
def test_of_packed_bits_the_pixels_are_right(file: tuple[bytes, Array]) -> None:
    encoded, wanted = file
    np.testing.assert_array_equal(decoded(encoded, wanted.shape[1], wanted.shape[0]), wanted)


@settings(max_examples=60)
@given(
    width=st.integers(1, 80),
    height=st.integers(1, 40),
    seed=st.integers(0, 1 << 32),
    compression=st.sampled_from(["group3", "group4"]),
    is_turned=st.booleans(),
)
def test_of_fax_codes_the_pixels_are_right(
    width: int, height: int, seed: int, compression: str, is_turned: bool
) -> None:
    bits = np.random.default_rng(seed).integers(0, 2, (height, width)).repeat(3, 1)[:, :width].astype(bool)
    written = io.BytesIO()
    Image.fromarray(bits).save(written, "TIFF", compression=compression)
    encoded = written.getvalue()
    if is_turned:
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            page = file.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            strips = [
                reversed_bits(encoded[at : at + size])
                for at, size in zip(page.dataoffsets, page.databytecounts, strict=True)
            ]
            tags: dict[int, tuple[str, Sequence[int]]] = {
                number: ("I", [int(page.tags[number].value)])
                for number in (256, 257, 259, 262, 277, 278, 292, 293)
                if number in page.tags
            }
        encoded = tiff({**tags, 266: ("H", [2])}, strips)
    np.testing.assert_array_equal(decoded(encoded, width, height), bits[..., None].repeat(3, 2) * 255)


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """What JPEG hardly changes."""
    few = np.random.default_rng(seed).integers(40, 216, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


@settings(max_examples=60)
@given(
    width=st.integers(60, 100),
    height=st.integers(60, 100),
    seed=st.integers(0, 1 << 32),
    mode=st.sampled_from(["L", "RGB", "YCbCr"]),
    tile=st.sampled_from([None, (16, 32), (64, 64)]),
    subsampling=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
)
def test_of_jpeg_in_tiff_the_pixels_are_nearly_right(
    width: int, height: int, seed: int, mode: str, tile: tuple[int, int] | None, subsampling: tuple[int, int]
) -> None:
    image = smooth(width, height, seed)
    options: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 95}, "tile": tile}
    if mode == "RGB":
        options["compressionargs"] |= {"outcolorspace": "RGB"}
    if mode == "YCbCr":
        options["subsampling"] = subsampling
    data = np.asarray(image.convert("L") if mode == "L" else image)
    encoded = by_tifffile(data, photometric="minisblack" if mode == "L" else "rgb", **options)
    wanted = np.asarray((image.convert("L") if mode == "L" else image).convert("RGB")).astype(int)
    assert abs(decoded(encoded, width, height) - wanted).mean() < 3


def test_cmyk_by_jpeg_and_cielab_have_their_colours() -> None:
    image = smooth(64, 48, 1)
    wanted = np.asarray(image).astype(int)
    cmyk = io.BytesIO()
    image.convert("CMYK").save(cmyk, "TIFF", compression="jpeg", quality=95)
    assert abs(decoded(cmyk.getvalue(), 64, 48) - wanted).mean() < 3
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert lab is not None
    samples = np.frombuffer(lab.tobytes(), np.uint8).reshape(48, 64, 3)  # a and b signed, as in TIFF
    for options in ({}, {"compression": "lzw", "tile": (16, 16)}, {"compression": "zlib", "predictor": True}):
        encoded = by_tifffile(samples, photometric="cielab", **options)
        assert abs(decoded(encoded, 64, 48) - wanted).mean() < 3


GREY, COLOUR = np.zeros((16, 16)), np.zeros((16, 16, 3))
REFUSED: dict[str, tuple[str, bytes]] = {
    f"{name} {dtype}": (what, by_tifffile(data.astype(dtype), photometric=name))
    for name, data in (("minisblack", GREY), ("rgb", COLOUR))
    for dtype, what in {
        "i1": "signed", "i2": "signed", "i4": "signed", "u4": "32 bits", "u8": "64 bits", "f2": "floating-point",
        "f4": "floating-point", "f8": "floating-point", "c8": "complex",
    }.items()
}  # fmt: skip


def plain_grey(bits: int = 8, samples: int = 1, order: str = "<", **more: tuple[str, Sequence[int]]) -> bytes:
    """A grey file by hand, of 8 x 8 pixels; `more` are tags, their numbers behind a t."""
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [8]), 257: ("I", [8]), 258: ("H", [bits]), 259: ("H", [1]), 262: ("H", [1]), 277: ("H", [samples]),
        278: ("I", [8]),
    }  # fmt: skip
    tags |= {int(name[1:]): values for name, values in more.items()}
    return tiff({number: said for number, said in tags.items() if said[1]}, [bytes(range(64)) * 32], order)


@pytest.mark.parametrize(("extra", "wanted"), [(2, [204, 204, 255]), (0, [0, 0, 255]), (None, None)])
def test_a_palette_may_have_alpha_and_rgb_an_alpha_of_which_nothing_is_said(
    extra: int | None, wanted: list[int] | None
) -> None:
    colours = [0] * 256 + [0] * 256 + [0] * 7 + [65535] * 249
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [4]), 257: ("I", [4]), 258: ("H", [8, 8]), 259: ("H", [1]), 262: ("H", [3]), 277: ("H", [2]),
        278: ("I", [4]), 320: ("H", colours),
    }  # fmt: skip
    if extra is not None:
        tags[338] = ("H", [extra])
        assert decoded(tiff(tags, [bytes((9, 51)) * 16]), 4, 4)[0, 0].tolist() == wanted
        return
    del tags[320]
    tags |= {258: ("H", [8] * 4), 262: ("H", [2]), 277: ("H", [4])}
    assert decoded(tiff(tags, [bytes((0, 0, 255, 51)) * 16]), 4, 4)[0, 0].tolist() == [204, 204, 255]


REFUSED |= {f"{bits} bits": (f"{bits} bits", plain_grey(bits)) for bits in (3, 5, 6, 7, 10, 14, 24, 32, 64)}
REFUSED |= {
    "samples of unlike bits": ("5, 6, 5 bits", plain_grey(t262=("H", [2]), t258=("H", [5, 6, 5]), t277=("H", [3]))),
    "RGB of 12 bits": ("12 bits", plain_grey(t262=("H", [2]), t258=("H", [12, 12, 12]), t277=("H", [3]))),
    "grey of 16 bits with alpha": ("16 bits", plain_grey(16, 2, t338=("H", [2]))),
    "two samples": ("2 a pixel", plain_grey(8, 2)),
    "an alpha of a kind of its own": ("999", plain_grey(8, 2, t338=("H", [999]))),
    "a sensor": ("raw sensor", plain_grey(t262=("H", [32803]))),
    "ICCLab": ("ICCLab", plain_grey(t262=("H", [9]), t277=("H", [3]))),
    "LogLuv": ("photometric interpretation 32845", plain_grey(t262=("H", [32845]))),
    "a mask": ("mask", plain_grey(t262=("H", [4]))),
    "JPEG 2000": ("compression 34712", plain_grey(t259=("H", [34712]))),
    "WebP": ("compression 50001", plain_grey(t259=("H", [50001]))),
    "old JPEG": ("compression 6", plain_grey(t259=("H", [6]))),
    "a fax without line ends": ("compression 2", plain_grey(1, t259=("H", [2]))),
    "a fax of grey": ("compression 4", plain_grey(t259=("H", [4]))),
    "JPEG of 16 bits": ("JPEG of 16 bits", plain_grey(16, t259=("H", [7]))),
    "differences of floats": ("predictor 3", plain_grey(16, t259=("H", [8]), t317=("H", [3]))),
    "differences of 4 bits": ("predictor 2 for 4 bits", plain_grey(4, t259=("H", [8]), t317=("H", [2]))),
    "turned bits in 16": ("fill order 2", plain_grey(16, t266=("H", [2]))),
    "turned bits, packed": ("fill order 2", plain_grey(t259=("H", [5]), t266=("H", [2]))),
    "three planes": ("planes", plain_grey(t284=("H", [3]))),
    "planes of grey and alpha": ("planes", plain_grey(8, 2, t284=("H", [2]), t338=("H", [2]))),
    "planes of RGB and a fourth sample": ("planes", plain_grey(8, 4, t262=("H", [2]), t284=("H", [2]))),
    "planes of CIELab": ("planes of CIELab", plain_grey(8, 3, t262=("H", [8]), t284=("H", [2]))),
    "JPEG in planes": ("JPEG", plain_grey(8, 3, t259=("H", [7]), t262=("H", [2]), t284=("H", [2]))),
    "JPEG of a palette": ("JPEG of palette", plain_grey(t259=("H", [7]), t262=("H", [3]))),
    "subsampled YCbCr": ("subsampled", plain_grey(8, 3, t262=("H", [6]), t530=("H", [2, 1]))),
    "YCbCr of which nothing is said": ("subsampled", plain_grey(8, 3, t262=("H", [6]))),
    "other inks": ("inks", plain_grey(8, 4, t262=("H", [5]), t332=("H", [2]))),
    "a big-endian BigTIFF": ("BigTIFF", by_tifffile(GREY.astype(">u2"), bigtiff=True, byteorder=">")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_their_name(name: str) -> None:
    what, encoded = REFUSED[name]
    with pytest.raises(UnsupportedError, match="TIFF") as refusal:
        decoded(encoded, 8, 8)
    assert what in refusal.value.message and len(refusal.value.message) < 200


def pages(*written: tuple[int, int, int]) -> bytes:
    """A file with a page for each width, shade and NewSubfileType."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for width, shade, kind in written:
            data = np.full((width, width), shade, bool if kind == 4 else np.uint8)
            writer.write(data, photometric="minisblack", subfiletype=kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("written", "shade"),
    [
        ([(16, 10, 0), (32, 20, 0)], 10),
        ([(16, 10, 1), (32, 20, 0), (48, 30, 0), (24, 40, 0)], 30),
        ([(16, 10, 1), (64, 50, 1), (32, 20, 0)], 20),
        ([(16, 10, 1), (64, 1, 4), (32, 20, 2)], 20),
        ([(16, 10, 1)], 10),
        ([(16, 10, 1), (32, 20, 1)], 10),
    ],
)
def test_the_image_is_the_first_page_or_the_largest_behind_a_thumbnail(
    written: list[tuple[int, int, int]], shade: int
) -> None:
    assert decoded(pages(*written), 8, 8)[0, 0].tolist() == [shade] * 3


def behind_a_thumbnail(large: Array, photometric: str) -> bytes:
    """As cameras write it: a small RGB page that refers to a large one."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(np.zeros((8, 8, 3), np.uint8), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(large, photometric=photometric, subfiletype=0)
    return out.getvalue()


def test_behind_a_thumbnail_its_large_page_is_read_or_refused() -> None:
    large = np.full((32, 32), 77, np.uint8)
    assert decoded(behind_a_thumbnail(large, "minisblack"), 8, 8)[0, 0].tolist() == [77] * 3
    with pytest.raises(UnsupportedError, match="raw sensor"):
        decoded(behind_a_thumbnail(large.astype(np.uint16), "cfa"), 8, 8)


def test_the_size_of_the_page_that_is_read_counts() -> None:
    with pytest.raises(TooLargeError, match="400 x 400"):
        decoded(pages((8, 1, 1), (400, 2, 0)), 8, 8)
    assert decoded(pages((8, 1, 0), (400, 2, 0)), 8, 8)[0, 0].tolist() == [1] * 3


def test_pages_that_refer_to_themselves_end() -> None:
    encoded = bytearray(pages((8, 9, 1)))
    (first,) = struct.unpack_from("<I", encoded, 4)
    (count,) = struct.unpack_from("<H", encoded, first)
    struct.pack_into("<I", encoded, first + 2 + 12 * count, first)
    assert decoded(bytes(encoded), 8, 8)[0, 0].tolist() == [9] * 3


ANCILLARY = [
    270,
    271,
    272,
    282,
    283,
    296,
    305,
    306,
    315,
    316,
    318,
    700,
    33432,
    33723,
    34377,
    34665,
    34675,
    34853,
    50706,
]


@settings(max_examples=150)
@given(
    extra=st.dictionaries(
        st.sampled_from(ANCILLARY) | st.integers(40_000, 65_535),
        st.tuples(st.integers(0, 65_535), st.integers(0, (1 << 32) - 1), st.binary(min_size=4, max_size=4)),
        min_size=1,
        max_size=12,
    ),
    order=st.sampled_from("<>"),
)
def test_no_tag_that_says_nothing_of_pixels_can_break_them(
    extra: dict[int, tuple[int, int, bytes]], order: str
) -> None:
    encoded = plain_grey(order=order)
    (first,) = struct.unpack_from(order + "I", encoded, 4)
    (count,) = struct.unpack_from(order + "H", encoded, first)
    entries = encoded[first + 2 : first + 2 + 12 * count]
    entries += b"".join(struct.pack(order + "HHI", number, *said[:2]) + said[2] for number, said in extra.items())
    start = len(encoded)
    broken = encoded[:4] + struct.pack(order + "I", start) + encoded[8:]
    broken += struct.pack(order + "H", count + len(extra)) + entries + b"\xff\xff\xff\xff"
    np.testing.assert_array_equal(decoded(broken, 8, 8), decoded(encoded, 8, 8))


@pytest.mark.parametrize(
    "encoded",
    [
        b"II*\0", b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0\xff\xff", b"II*\0\0\0\0\0", b"II+\0\x08\0\0\0",
        plain_grey(t262=("H", [])), plain_grey(t257=("H", [])), plain_grey(t258=("f", [8])),
        plain_grey(t262=("b", [1])), plain_grey(t262=("H", [3]), t320=("H", [7] * 700)), plain_grey()[:-30],
    ],
)  # fmt: skip
def test_broken_directories_are_an_answer_to_the_client(encoded: bytes) -> None:
    with pytest.raises((UndecodableError, UnsupportedError)):
        decoded(encoded, 8, 8)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_is_none_turns_nothing(orientation: int) -> None:
    np.testing.assert_array_equal(decoded(plain_grey(t274=("H", [orientation])), 8, 8), decoded(plain_grey(), 8, 8))


@settings(max_examples=150)
@given(file=whole_bytes(), data=st.data())
def test_a_changed_tag_gives_pixels_or_an_answer_to_the_client(
    file: tuple[Kind, bytes, Array], data: st.DataObject
) -> None:
    _, encoded, wanted = file
    order = "<" if encoded[:2] == b"II" else ">"
    changed = bytearray(encoded)
    at = struct.unpack_from(order + "I", encoded, 8 if 43 in encoded[2:4] else 4)[0]
    changed[at + data.draw(st.integers(0, 150))] = data.draw(st.integers(0, 255))
    try:
        decoded(bytes(changed), wanted.shape[1], wanted.shape[0])
    except ServerError as error:
        assert 400 <= error.status < 500


def test_a_broken_file_writes_nothing_into_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).bytes(64)
    for compression in (2, 3, 4, 5, 7, 8, 50000):
        encoded = plain_grey(1, t259=("H", [compression]))
        with suppress(ServerError):  # libtiff fills in what it misses of a fax
            decoded(encoded[:8] + rows + encoded[72:], 8, 8)
    assert capfd.readouterr() == ("", "")
