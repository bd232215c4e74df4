"""What a terminal does to a service: Ctrl-C, again Ctrl-C, its end; it tells all processes, at any moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.service import Service, StartService

pytestmark = pytest.mark.slow


def processes(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in processes(int(child)))]


def send_to_all(service: Service, number: signal.Signals) -> None:
    for pid in processes(service.process.pid):
        os.kill(pid, number)


def answers(service: Service, path: str, status: int) -> None:
    """Waits until a page is answered so. The engine may still load: this is about processes, not about images."""
    service.until(lambda: httpx.get(f"{service.url}{path}").status_code == status)


def ended(service: Service) -> tuple[int, str]:
    """Exit status and log."""
    status = service.process.wait()
    service.reader.join()
    return status, "".join(service.log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("has_begun", [True, False], ids=["answering", "starting"])
def test_a_terminal_ends_the_service_as_sigterm_does(
    start_service: StartService, number: signal.Signals, has_begun: bool
) -> None:
    service = start_service(wait=False, preloaded=False)
    service.until(lambda: any("http-0 is process" in line for line in service.log))
    if has_begun:
        answers(service, "/livez", 200)
    send_to_all(service, number)
    status, log = ended(service)
    assert status == 0
    assert "shutting down" in log
    assert "Traceback" not in log and "died" not in log and "ended with status" not in log


def test_a_service_that_is_to_outlive_its_terminal_does(start_service: StartService) -> None:
    service = start_service(wait=False, preloaded=False, hangup=signal.SIG_IGN)  # as nohup does
    answers(service, "/livez", 200)
    ignored = Path(f"/proc/{service.process.pid}/status").read_text().partition("SigIgn:")[2].split()[0]
    assert int(ignored, 16) & 1 << (signal.SIGHUP - 1)
    send_to_all(service, signal.SIGHUP)
    answers(service, "/livez", 200)
    assert service.stop() == 0


def test_a_second_ctrl_c_waits_for_nothing_more(start_service: StartService) -> None:
    service = start_service("--drain-delay-s", "60", wait=False, preloaded=False)
    answers(service, "/livez", 200)
    send_to_all(service, signal.SIGINT)
    service.until(lambda: "shutting down" in httpx.get(f"{service.url}/readyz").text)
    send_to_all(service, signal.SIGINT)
    assert ended(service)[0] == 1
