"""Keys of a real service: from files, never in a log or a command line; and what any client may ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.service import Service, StartService

pytestmark = pytest.mark.slow

USER, ADMIN, SCRAPER = "hush-user-1", "hush-admin-2", "hush-scraper-3"
ORIGIN = "https://app.example.org"


def key_files(folder: Path) -> list[str]:
    """Flags that name a file for each key."""
    flags = []
    for name, key in {"api": USER, "admin": ADMIN, "metrics": SCRAPER}.items():
        file = folder / f"{name}.key"
        file.write_text(f"{key}\n")
        flags += [f"--{name}-key-file", str(file)]
    return flags


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with all keys, and a page of another origin that may ask it; nothing of the keys is in its log."""
    folder = tmp_path_factory.mktemp("keys")
    service = Service(*key_files(folder), "--cors-origin", ORIGIN, state_dir=folder / "state")
    service.wait_until_ready()
    yield service
    assert service.stop() == 0
    assert "hush" not in "".join(service.log) and "Traceback" not in "".join(service.log)


def command_lines(service: Service) -> str:
    """What `ps` shows of all its processes."""
    pids = [service.process.pid, service.pid_of("engine"), service.pid_of("http-0")]
    return "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)


def test_keys_from_files_open_and_are_seen_nowhere(service: Service, photo: bytes) -> None:
    form = {"image": ("a.jpg", photo)}
    with httpx.Client(base_url=service.url) as client:
        assert client.post("/classify", files=form).status_code == 401
        for key, status in {USER: 200, ADMIN: 200, SCRAPER: 401, USER + "x": 401}.items():
            answer = client.post("/classify", files=form, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status, key
        assert client.get("/metrics").status_code == 401
        assert "tome_" in client.get("/metrics", headers={"authorization": f"Bearer {SCRAPER}"}).text
    assert "hush" not in command_lines(service)


def test_a_password_of_redis_is_not_logged_where_its_url_is_wrong(start_service: StartService) -> None:
    pytest.importorskip("redis")
    service = start_service("--shared-config", "redis://:hush@127.0.0.1:port/0", wait=False)
    assert service.process.wait() == 2
    service.reader.join()
    log = "".join(service.log)
    assert "must have the form redis" in log and "hush" not in log and "Traceback" not in log


def test_head_and_what_is_refused_keep_a_connection_in_step(service: Service, photo: bytes) -> None:
    with httpx.Client(base_url=service.url, headers={"origin": ORIGIN, "x-api-key": USER}) as client:
        for path in ("/", "/docs", "/openapi.json", "/livez", "/readyz", "/metrics", "/v1/models", "/nothing"):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b"") and get.content
        assert client.options("/classify", headers={"access-control-request-method": "POST"}).status_code == 200
        image = {"content-type": "image/jpeg"}
        gzipped = client.post("/classify", content=photo, headers=image | {"content-encoding": "gzip"})
        assert (gzipped.status_code, gzipped.headers["access-control-allow-origin"]) == (415, ORIGIN)
        assert client.delete("/v1/models").headers["allow"] == "GET, HEAD"
        assert client.post("/classify", content=photo, headers=image).status_code == 200
