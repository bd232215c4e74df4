"""Decoder processes, real ones: the same pixels, limits that hold, crashes and departures that cost nobody else."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from PIL import Image

from server.errors import ServerError, TooLargeError, UnavailableError, UndecodableError, UnsupportedError
from server.images import apart, decoder_process
from server.images.apart import Apart
from server.images.cost import Budget, Cost, cost_of
from server.images.decoder import Decoded, Job, receive, send
from server.images.decoder_process import DecoderProcess
from server.images.decoders import Decoders
from server.images.image import JpegFile, Pixels
from server.images.pillow import decode
from server.images.preprocessing import Preprocessing
from tests.server.conftest import encode, until
from tests.server.expensive import jpeg, many_scans, png, tiff_of_strips

MIB = 1 << 20
MAX_PIXELS = 50_000_000
HALF = (0.5, 0.5, 0.5)
MODEL = Preprocessing((32, 32), (32, 32), "center", "bicubic", HALF, HALF)
ANY = Cost(64 * MIB, 0, False)
LONG = many_scans(8000, 4000)  # many seconds of work
ALLOWED = many_scans(1900, 4000)
SMALL = encode(Image.new("RGB", (50, 40), (10, 200, 30)))


@pytest.fixture
async def decoding() -> AsyncIterator[Apart]:
    """Two processes of 256 MiB together."""
    made = Apart(256 * MIB, 2, MAX_PIXELS)
    yield made
    made.close()


def pid_of(decoder: DecoderProcess) -> int:
    process = decoder._process
    assert process is not None
    return process.pid


async def working(decoding: Apart, count: int = 1) -> list[DecoderProcess]:
    """The processes that decode, once there are so many and each has spent some time on its image."""

    def spent(decoder: DecoderProcess) -> int:
        try:
            return sum(map(int, Path(f"/proc/{pid_of(decoder)}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
        except (AssertionError, OSError):
            return 0

    await until(lambda: len(decoding._busy) == count and all(spent(decoder) > 40 for decoder in decoding._busy))
    return list(decoding._busy)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
async def test_the_pixels_are_those_of_decode(format: str, decoding: Apart) -> None:
    encoded = encode(Image.linear_gradient("L").convert("RGB"), format)
    assert await decoding.decode(encoded, MODEL, ANY) == decode(encoded, MODEL, MAX_PIXELS)


@pytest.mark.parametrize("encoded", [b"", b"hello", SMALL[:60], png(10, 10)[:-30], jpeg()[:200]])
async def test_the_errors_are_those_of_decode(encoded: bytes, decoding: Apart) -> None:
    with pytest.raises(ServerError) as wanted:
        decode(encoded, MODEL, MAX_PIXELS)
    with pytest.raises(type(wanted.value)) as got:
        await decoding.decode(encoded, MODEL, ANY)
    assert (got.value.code, got.value.message.split(" at 0x")[0]) == (
        wanted.value.code,
        wanted.value.message.split(" at 0x")[0],
    )


async def test_one_process_does_for_images_one_after_the_other(decoding: Apart) -> None:
    pids = set()
    for _ in range(3):
        await decoding.decode(SMALL, MODEL, ANY)
        pids.add(pid_of(decoding._idle[0]))
    assert len(pids) == len(decoding._idle) == 1


async def test_what_takes_more_memory_than_it_may_is_refused_and_nothing_of_it_stays(decoding: Apart) -> None:
    large = png(6000, 6000)
    with pytest.raises(TooLargeError, match="more than the 64 MiB of memory") as refused:
        await decoding.decode(large, MODEL, ANY)
    assert refused.value.details == {"max_memory": 64 * MIB}
    assert decoding._idle == []
    assert await decoding.decode(large, MODEL, Cost(256 * MIB, 0, False)) == bytes(32 * 32 * 3)


async def test_what_can_never_fit_is_refused_at_once(decoding: Apart) -> None:
    with pytest.raises(TooLargeError, match="takes 300 MiB of memory or more; this server has 256 MiB for it"):
        await decoding.decode(SMALL, MODEL, Cost(900 * MIB, 300 * MIB, False))
    assert decoding._idle == []


async def test_what_a_library_says_of_a_lack_of_memory_is_understood(decoding: Apart) -> None:
    clear = encode(Image.new("RGBA", (7000, 7000)), "WEBP", lossless=True)
    with pytest.raises(TooLargeError, match="with 256 MiB of memory, the most available"):
        await decoding.decode(clear, MODEL, cost_of(clear, MODEL, MAX_PIXELS))


async def test_what_takes_too_long_is_killed(decoding: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "MOST_CPU_S", 1)
    with pytest.raises(TooLargeError, match="more than 1 s of processor time") as refused:
        await decoding.decode(LONG, MODEL, ANY)
    assert refused.value.details == {"max_decode_s": 1}
    assert len(await decoding.decode(SMALL, MODEL, ANY)) == 32 * 32 * 3


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGSEGV, UndecodableError), (signal.SIGABRT, UndecodableError), (signal.SIGKILL, TooLargeError)],
)
async def test_a_crash_is_the_error_of_its_image_alone(
    number: signal.Signals, kind: type[ServerError], decoding: Apart
) -> None:
    images = [asyncio.ensure_future(decoding.decode(LONG, MODEL, ANY)) for _ in range(2)]
    first, second = await working(decoding, 2)
    os.kill(pid_of(first), number)
    done, (other,) = await asyncio.wait(images, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(kind):
        done.pop().result()
    assert len(await decoding.decode(SMALL, MODEL, ANY)) == 32 * 32 * 3
    assert decoding._busy == {second}
    other.cancel()
    await asyncio.wait([other])


async def test_a_process_that_dies_while_it_has_nothing_to_do_is_replaced(decoding: Apart) -> None:
    await decoding.decode(SMALL, MODEL, ANY)
    os.kill(pid_of(decoding._idle[0]), signal.SIGKILL)
    await until(lambda: not decoding._idle[0].is_usable)
    assert len(await decoding.decode(SMALL, MODEL, ANY)) == 32 * 32 * 3


async def test_who_leaves_frees_the_place_at_once(decoding: Apart) -> None:
    leaving = [asyncio.ensure_future(decoding.decode(LONG, MODEL, Cost(128 * MIB, 0, False))) for _ in range(2)]
    decoders = await working(decoding, 2)
    waiting = asyncio.ensure_future(decoding.decode(SMALL, MODEL, Cost(256 * MIB, 0, False)))
    await asyncio.sleep(0)
    for image in leaving:
        image.cancel()
    assert len(await waiting) == 32 * 32 * 3
    await until(lambda: not any(decoder.is_usable for decoder in decoders))


async def test_who_leaves_before_the_process_is_there_leaves_none(decoding: Apart) -> None:
    image = asyncio.ensure_future(decoding.decode(LONG, MODEL, ANY))
    await until(lambda: bool(decoding._busy))
    (decoder,) = decoding._busy
    image.cancel()
    await asyncio.wait([image])
    await until(lambda: not decoder.is_usable)
    assert decoding._idle == []


async def test_an_idle_process_ends_after_a_while(decoding: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_IDLE_S", 0.01)
    await decoding.decode(SMALL, MODEL, ANY)
    (decoder,) = decoding._idle
    await until(lambda: not decoder.is_usable)
    assert decoding._idle == []


async def test_a_decoder_that_does_not_start_is_told_from_a_bad_image(
    decoding: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_process, "_PROGRAM", "raise SystemExit(3)")
    with pytest.raises(UnavailableError, match="does not start"):
        await decoding.decode(SMALL, MODEL, ANY)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UnavailableError, match="cannot be started"):
        await decoding.decode(SMALL, MODEL, ANY)


async def test_a_signal_to_all_processes_ends_no_decoder(decoding: Apart) -> None:
    """As systemd sends it: what is decoded is still waited for."""
    decoded = asyncio.ensure_future(decoding.decode(ALLOWED, MODEL, ANY))
    (decoder,) = await working(decoding)
    os.kill(pid_of(decoder), signal.SIGTERM)
    os.kill(pid_of(decoder), signal.SIGINT)
    assert await decoded == decode(ALLOWED, MODEL, MAX_PIXELS)


async def test_a_decoder_gets_no_settings_and_no_descriptors(
    decoding: Apart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOME_API_KEY", "a-secret-key")
    file = tmp_path / "shared"
    with file.open("w") as shared:
        os.set_inheritable(shared.fileno(), True)  # as what the supervisor hands to its processes
        await decoding.decode(SMALL, MODEL, ANY)
    (decoder,) = decoding._idle
    process = Path(f"/proc/{pid_of(decoder)}")
    assert b"a-secret-key" not in (process / "environ").read_bytes()
    assert str(file) not in {os.readlink(each) for each in (process / "fd").iterdir()}


@pytest.mark.parametrize("missing", range(1, 12))
def test_an_answer_that_is_cut_off_is_none(missing: int) -> None:
    whole = io.BytesIO()
    send(whole, Decoded(b"pixel"))
    assert receive(io.BytesIO(whole.getvalue())) == whole.getvalue()[4:]
    assert receive(io.BytesIO(whole.getvalue()[:-missing])) is None


PARENT = """
import sys
from pathlib import Path
from server.images.decoder import Job
from server.images.decoder_process import DecoderProcess
from server.images.preprocessing import Preprocessing
half = (0.5, 0.5, 0.5)
model = Preprocessing((32, 32), (32, 32), "center", "bicubic", half, half)
decoder, encoded, small = DecoderProcess(), Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes()
decoder.decode(Job(len(small), model, 50_000_000, 1 << 26, 10), small)
print(decoder._process.pid, flush=True)
decoder.decode(Job(len(encoded), model, 50_000_000, 1 << 26, 1000), encoded)
"""


async def test_a_decoder_ends_with_the_process_that_asked_it(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(many_scans(40_000, 4000))  # minutes
    (tmp_path / "small").write_bytes(SMALL)
    command = [sys.executable, "-c", PARENT, str(tmp_path / "long"), str(tmp_path / "small")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        decoder = int(parent.stdout.readline())
        parent.kill()
    state = Path(f"/proc/{decoder}/stat")
    await until(lambda: not state.exists() or " Z " in state.read_text())


async def test_a_photo_is_decoded_in_a_thread_and_the_rest_apart() -> None:
    decoders = Decoders(MAX_PIXELS)
    try:
        photo = await decoders.read(SMALL, MODEL, False)
        assert photo == Pixels(decode(SMALL, MODEL, MAX_PIXELS))
        assert isinstance(await decoders.read(jpeg(), MODEL, True), JpegFile)
        assert decoders._apart._idle == []
        tiff = encode(Image.new("RGB", (50, 40), (10, 200, 30)), "TIFF")
        assert await decoders.read(tiff, MODEL, False) == photo
        assert len(decoders._apart._idle) == 1
        for bad, kind in ((b"hello", UnsupportedError), (tiff_of_strips(300_000), TooLargeError)):
            with pytest.raises(kind):
                await decoders.read(bad, MODEL, False)
    finally:
        decoders.close()


async def test_photos_go_on_while_others_are_decoded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "of", staticmethod(lambda *facts: Budget(64 * MIB, 128 * MIB)))
    decoders = Decoders(MAX_PIXELS)
    waiting = [asyncio.ensure_future(decoders.read(ALLOWED, MODEL, False)) for _ in range(10)]
    try:
        await until(lambda: bool(decoders._apart._busy))
        for _ in range(20):
            assert isinstance(await decoders.read(SMALL, MODEL, False), Pixels)
        assert not any(image.done() for image in waiting)
    finally:
        for image in waiting:
            image.cancel()
        await asyncio.wait(waiting)
        decoders.close()


def test_a_job_that_is_not_read_any_more_does_not_hang() -> None:
    decoder = DecoderProcess()
    decoder.decode(Job(len(SMALL), MODEL, MAX_PIXELS, 64 * MIB, 10), SMALL)
    os.kill(pid_of(decoder), signal.SIGKILL)
    with pytest.raises(TooLargeError):
        decoder.decode(Job(32 * MIB, MODEL, MAX_PIXELS, 64 * MIB, 10), bytes(32 * MIB))
    decoder.close()
