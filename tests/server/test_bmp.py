"""BMP: the pixels of every kind that is read, by any header, palette, masks and codes; others are refused."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from server.errors import ServerError, TooLargeError, UndecodableError, UnsupportedError
from tests.server.test_tiff import decoded, packed_rows

Array = NDArray[Any]
RAW, RLE8, RLE4, MASKS, MASKS_WITH_ALPHA = 0, 1, 2, 3, 6
OS2 = 12


def bmp(
    size: tuple[int, int],
    bits: int,
    pixels: bytes,
    *,
    header: int = 40,
    compression: int = RAW,
    colours: Sequence[Sequence[int]] = (),
    masks: Sequence[int] = (),
    gap: int = 0,
) -> bytes:
    """A file by hand.

    Args:
        size: Width and height, which is below zero where the first row is the topmost.
        bits: A pixel.
        pixels: Rows, or codes.
        header: Its bytes.
        compression: As the header says.
        colours: Of the palette: red, green, blue.
        masks: Red, green, blue and maybe alpha.
        gap: Bytes between the palette and the pixels.
    """
    palette = b"".join(bytes((blue, green, red)) + bytes(header != OS2) for red, green, blue in colours)
    if header == OS2:
        said = struct.pack("<IHHHH", header, *size, 1, bits)
    else:
        said = struct.pack("<IiiHHIIiiII", header, *size, 1, bits, compression, 0, 0, 0, len(colours), 0)
        said += struct.pack(f"<{len(masks)}I", *masks)
        said = said.ljust(header, b"\0")
    start = 14 + len(said) + len(palette) + gap
    return struct.pack("<2sIII", b"BM", start + len(pixels), 0, start) + said + palette + bytes(gap) + pixels


def padded(rows: Sequence[bytes]) -> bytes:
    return b"".join(row.ljust(-(-len(row) // 4) * 4, b"\0") for row in rows)


LAYOUTS = {
    16: [(0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0)],
    24: [(0xFF0000, 0xFF00, 0xFF, 0)],
    32: [
        (0xFF0000, 0xFF00, 0xFF, 0),
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (0xFF000000, 0xFF0000, 0xFF00, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    ],
}
USUAL = {16: (0x7C00, 0x3E0, 0x1F, 0), 24: (0xFF0000, 0xFF00, 0xFF, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}


def channel(values: Array, mask: int) -> Array:
    """What a mask cuts out, in 8 bits."""
    if not mask:
        return np.full_like(values, 255)
    low = (mask & -mask).bit_length() - 1
    return np.asarray(((values & mask) >> low) * 255 / (mask >> low))


@st.composite
def with_masks(draw: st.DrawFn) -> tuple[bytes, Array]:
    bits = draw(st.sampled_from(sorted(LAYOUTS)))
    masks, form = USUAL[bits], draw(st.sampled_from(["usual", "masks", "alpha masks", "no masks"]))
    header = draw(st.sampled_from([40, 52, 56, 108, 124]))
    options: dict[str, Any] = {"header": header}
    if form == "usual":
        options["header"] = draw(st.sampled_from([OS2, 64, header])) if bits == 24 else header
    elif form == "no masks":
        options |= {"compression": MASKS, "masks": [0] * 4}
    else:
        masks = draw(st.sampled_from(LAYOUTS[bits]))
        if form == "alpha masks":
            options |= {"compression": MASKS_WITH_ALPHA, "masks": masks}
        elif header < 56:
            masks = (*masks[:3], 0)
            options |= {"compression": MASKS, "masks": masks[:3]}
        else:
            options |= {"compression": MASKS, "masks": masks}
        if masks not in LAYOUTS[bits]:
            masks = USUAL[bits]
            options["masks"] = masks[: len(options["masks"])]
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    values = np.random.default_rng(draw(st.integers(0, 1 << 32))).integers(0, 1 << bits, (height, width))
    has_alpha = draw(st.booleans())
    if masks[3] and not has_alpha:
        values &= ~masks[3]
    rows = [values[y].astype("<u4").view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes() for y in range(height)]
    is_topdown = options["header"] != OS2 and draw(st.booleans())
    encoded = bmp(
        (width, -height if is_topdown else height), bits, padded(rows if is_topdown else rows[::-1]),
        gap=draw(st.sampled_from([0, 0, 3])), **options,
    )  # fmt: skip
    colour = np.stack([channel(values, mask) for mask in masks[:3]], -1)
    alpha = channel(values, masks[3] if has_alpha else 0)[..., None]
    if not alpha.any():
        alpha = np.full_like(alpha, 255)
    return encoded, (colour * alpha + 255 * (255 - alpha)) / 255


@settings(max_examples=250)
@given(file=with_masks())
def test_of_16_to_32_bits_the_pixels_are_right(file: tuple[bytes, Array]) -> None:
    encoded, wanted = file
    assert abs(decoded(encoded, wanted.shape[1], wanted.shape[0]) - wanted).max() <= 1


@st.composite
def palettes(draw: st.DrawFn, bits: int) -> Sequence[Sequence[int]]:
    """Colours, few or many; or the greys and black and white that Pillow has its own mind about."""
    few = draw(st.integers(1, 1 << bits))
    form = draw(st.sampled_from(["any", "greys", "black and white", "white and black"]))
    if form == "greys":
        return [(grey,) * 3 for grey in range(few)]
    if form != "any":
        return [(0, 0, 0), (255, 255, 255)][:: 1 if form == "black and white" else -1]
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    return [tuple(map(int, colour)) for colour in chance.integers(0, 256, (few, 3))]


def runs(row: Sequence[int], four_bits: bool, lengths: Sequence[int]) -> bytes:
    """Codes of a row: pieces of so many pixels, one colour each as a run, else as they are."""
    code, at = b"", 0
    for length in lengths:
        piece = list(row[at : at + length])
        at += length
        if len(set(piece)) == 1:
            code += bytes((len(piece), piece[0] * 17 if four_bits else piece[0]))
        elif four_bits and len(set(piece[::2])) == len(set(piece[1::2])) == 1:
            code += bytes((len(piece), piece[0] << 4 | piece[1]))
        elif len(piece) >= 3:
            content = packed_rows(np.array([piece]), 4 if four_bits else 8)[0]
            code += bytes((0, len(piece))) + content + bytes(len(content) % 2)
        else:
            code += b"".join(bytes((1, value * 17 if four_bits else value)) for value in piece)
    return code


@st.composite
def with_palette(draw: st.DrawFn) -> tuple[bytes, Array]:
    bits = draw(st.sampled_from([1, 4, 8]))
    colours = draw(palettes(bits))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    indices = chance.integers(0, len(colours), (height, width))
    header = draw(st.sampled_from([OS2, 40, 52, 56, 64, 108, 124]))
    options: dict[str, Any] = {"header": header, "gap": draw(st.sampled_from([0, 0, 5]))}
    if header == OS2:
        options["gap"] = 0  # the palette ends where the pixels begin
    is_topdown = False
    if bits > 1 and header != OS2 and draw(st.booleans()):
        options["compression"] = RLE8 if bits == 8 else RLE4
        indices = indices.repeat(3, 1)[:, :width]
        skipped = chance.random(height) < 0.3
        indices[skipped] = 0
        code = b""
        for y in range(height)[::-1]:
            lengths = [int(length) for length in chance.integers(1, 12, width)]
            code += (b"" if skipped[y] else runs(indices[y].tolist(), bits == 4, lengths)) + b"\0\0"
        is_cut = draw(st.booleans()) and not skipped[0]
        pixels = code[:-2] if is_cut else code + b"\0\1"
    else:
        is_topdown = header != OS2 and draw(st.booleans())
        rows = packed_rows(indices, bits)
        pixels = padded(rows if is_topdown else rows[::-1])
    encoded = bmp((width, -height if is_topdown else height), bits, pixels, colours=colours, **options)
    return encoded, np.array(colours)[indices]


@settings(max_examples=300)
@given(file=with_palette())
def test_of_a_palette_the_pixels_are_right(file: tuple[bytes, Array]) -> None:
    encoded, wanted = file
    np.testing.assert_array_equal(decoded(encoded, wanted.shape[1], wanted.shape[0]), wanted)


def test_a_code_may_jump_to_the_right_and_upwards() -> None:
    code = b"\2\1\0\2\3\1\1\1\0\1"  # two pixels, three to the right and one up, one pixel, the end
    pixels = decoded(bmp((8, 3), 8, code, compression=RLE8, colours=[(0, 0, 9), (255, 0, 0)]), 8, 3)
    assert {(x, y) for y, x in np.argwhere(pixels[..., 0] == 255)} == {(0, 2), (1, 2), (5, 1)}


@pytest.mark.parametrize("header", [56, 108, 124])
def test_an_alpha_that_would_hide_everything_is_none(header: int) -> None:
    options: dict[str, Any] = {"header": header, "compression": MASKS, "masks": (0xFF0000, 0xFF00, 0xFF, 0xFF000000)}
    hidden = bytes((10, 20, 30, 0))
    assert decoded(bmp((4, 4), 32, hidden * 16, **options), 4, 4)[0, 0].tolist() == [30, 20, 10]
    shown = bytes((10, 20, 30, 255))
    assert decoded(bmp((4, 4), 32, hidden * 15 + shown, **options), 4, 4)[3, 0].tolist() == [255] * 3


REFUSED: dict[str, tuple[str, bytes]] = {
    "an unknown header": ("header of 41 bytes", bmp((8, 8), 24, bytes(300), header=41)),
    "2 bits": ("2 bits", bmp((8, 8), 2, bytes(300))),
    "64 bits": ("64 bits", bmp((8, 8), 64, bytes(600))),
    "10 bits a colour": (
        "3ff00000", bmp((8, 8), 32, bytes(300), compression=MASKS, masks=(0x3FF << 20, 0xFFC00, 0x3FF)),
    ),
    "an alpha of 1 bit": (
        "8000", bmp((8, 8), 16, bytes(300), header=108, compression=MASKS, masks=(0x7C00, 0x3E0, 0x1F, 0x8000)),
    ),
    "JPEG": ("compression 4", bmp((8, 8), 24, bytes(300), compression=4)),
    "PNG": ("compression 5", bmp((8, 8), 24, bytes(300), compression=5)),
    "a fax": ("compression 3", bmp((8, 8), 1, bytes(300), header=64, compression=3)),
    "runs of 24 bits": ("compression 1", bmp((8, 8), 24, bytes(300), compression=RLE8)),
    "runs from the top": ("compression 1", bmp((8, -8), 8, bytes(300), compression=RLE8)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_their_name(name: str) -> None:
    what, encoded = REFUSED[name]
    with pytest.raises(UnsupportedError, match="BMP") as refusal:
        decoded(encoded, 8, 8)
    assert what in refusal.value.message


def test_runs_are_not_spelled_out_for_more_pixels_than_are_allowed() -> None:
    with pytest.raises(TooLargeError, match="65535 x 65535"):
        decoded(bmp((65535, 65535), 8, b"\0\1", compression=RLE8, colours=[(0, 0, 0)]), 8, 8)


@pytest.mark.parametrize("code", [b"", b"\5", b"\5\0", b"\0\0", b"\0\5\1\1", b"\0\2\1"])
def test_runs_that_are_cut_off_are_an_answer_to_the_client(code: bytes) -> None:
    with pytest.raises(UndecodableError, match="cut off"):
        decoded(bmp((8, 8), 8, code, compression=RLE8, colours=[(0, 0, 0)]), 8, 8)


@settings(max_examples=200)
@given(file=with_palette() | with_masks(), at=st.integers(0, 80), value=st.integers(0, 255))
def test_a_changed_header_gives_pixels_or_an_answer_to_the_client(
    file: tuple[bytes, Array], at: int, value: int
) -> None:
    encoded, wanted = file
    changed = bytearray(encoded)
    changed[2 + at % (len(changed) - 2)] = value
    try:
        decoded(bytes(changed), wanted.shape[1], wanted.shape[0])
    except ServerError as error:
        assert 400 <= error.status < 500
