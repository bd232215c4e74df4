"""Small files that are expensive to decode, sent to a real service: memory, the others' answers, and the end."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.e2e.clients import classify, png
from tests.e2e.service import Service, StartService
from tests.server.expensive import many_scans

pytestmark = pytest.mark.slow


def decoders_of(pid: int) -> list[int]:
    """The decoder processes of an HTTP process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"server.images.decoder" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def is_gone(pid: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def wait_for(condition: object, within_s: float = 30) -> None:
    """For what holds when the service is gone already."""
    assert callable(condition)
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def peak_of(pid: int) -> int:
    """The most memory that a process has held, in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def clear(side: int) -> bytes:
    """A WebP of two kilobytes that takes 16 bytes a pixel."""
    file = io.BytesIO()
    Image.new("RGBA", (side, side)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def photos_while(service: Service, pool: ThreadPoolExecutor, files: list[bytes]) -> tuple[Counter[int], Counter[int]]:
    """Statuses of expensive files that are all sent at once, and those of photos meanwhile."""
    answers = [pool.submit(classify, service, file) for file in files]
    photos: Counter[int] = Counter()
    while not all(answer.done() for answer in answers):
        photos[classify(service, png(1)).status_code] += 1
    return Counter(answer.result().status_code for answer in answers), photos


def test_a_photo_is_answered_whatever_others_send_and_memory_is_bounded(start_service: StartService) -> None:
    service = start_service("--deadline-s", "60", preloaded=False)
    before = peak_of(service.pid_of("http-0"))
    with ThreadPoolExecutor(8) as pool:
        bombs, photos = photos_while(service, pool, [many_scans(20_000, 7000)] * 4)
        assert bombs == {413: 4} and photos.keys() <= {200}
        bombs, photos = photos_while(service, pool, [many_scans(50, 7000), clear(5000)] * 2)
        assert bombs == {200: 4} and photos.keys() == {200}
    assert httpx.get(f"{service.url}/readyz").status_code == 200
    assert peak_of(service.pid_of("http-0")) < before + (100 << 20)


def test_the_end_waits_for_what_decodes_and_leaves_no_process(start_service: StartService) -> None:
    service = start_service()
    http = service.pid_of("http-0")
    with ThreadPoolExecutor(4) as pool:
        file = many_scans(150, 7000)
        answers = [pool.submit(classify, service, file) for _ in range(2)]
        service.until(lambda: service.metrics()["tome_in_flight_images"] == 2 and bool(decoders_of(http)))
        decoders = decoders_of(http)
        service.process.send_signal(signal.SIGTERM)
        assert {answer.result().status_code for answer in answers} == {200}
    assert service.process.wait() == 0
    assert not any("is killed" in line for line in service.log)
    wait_for(lambda: all(map(is_gone, decoders)))


def test_a_killed_http_process_takes_its_decoders_along(start_service: StartService) -> None:
    service = start_service()
    http = service.pid_of("http-0")

    def send() -> None:
        with pytest.raises(httpx.TransportError):
            classify(service, many_scans(600, 7000))

    sending = threading.Thread(target=send)
    sending.start()
    service.until(lambda: bool(decoders_of(http)))
    decoders = decoders_of(http)
    os.kill(http, signal.SIGKILL)
    sending.join()
    wait_for(lambda: all(map(is_gone, decoders)))
    service.until(lambda: classify(service, png(1)).status_code == 200)
