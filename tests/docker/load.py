"""A steady load on a service, which remembers every answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import httpx

from tests.docker.cli import WAIT_S


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    status: int
    replica: str
    r: str
    text: str


class Load:
    """Requests to /classify, one after the other in each of a few threads, while the `with` block runs.

    Args:
        url: The service.
        photo: What is sent.
        r: What is asked for; None takes the deployment's.
        threads: Requests at a time at most.
        pause_s: From an answer to the thread's next request.
    """

    def __init__(self, url: str, photo: bytes, r: int | None = 8, threads: int = 2, pause_s: float = 0.3) -> None:
        self._url, self._photo, self._pause_s = f"{url}/classify", photo, pause_s
        self._asked = {} if r is None else {"r": r}
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        self.answers: list[Answer] = []

    def _run(self) -> None:
        with httpx.Client(timeout=WAIT_S) as client:
            while not self._ends.wait(self._pause_s):
                try:
                    answer = client.post(
                        self._url, params=self._asked, content=self._photo, headers={"content-type": "image/jpeg"}
                    )
                    replica, r = (answer.headers.get(name, "") for name in ("x-replica", "x-r"))
                    self.answers.append(Answer(answer.status_code, replica, r, answer.text))
                except httpx.TransportError as error:
                    self.answers.append(Answer(0, "", "", repr(error)))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()
        print(self.summary())  # pytest -s shows it

    def go_on(self, answers: int) -> list[Answer]:
        """Waits for so many more answers and gives them."""
        start = len(self.answers)
        self.until(lambda: len(self.answers) >= start + answers)
        return self.answers[start:]

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition, under load."""
        ends = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < ends, f"under load, after {self.summary()}"
            time.sleep(0.1)

    def until_answered_by(self, replicas: int) -> None:
        """Waits until just so many replicas have given the latest answers, ten for each."""
        self.until(lambda: len({a.replica for a in self.answers[-10 * replicas :]}) == replicas)

    def until_answered_with(self, r: int, replicas: int) -> None:
        """Waits until so many replicas have given the latest answers, all of them with an r."""
        self.until_answered_by(replicas)
        self.until(lambda: {a.r for a in self.answers[-10 * replicas :]} == {str(r)})
        assert len({a.replica for a in self.answers[-10 * replicas :]}) == replicas

    def failures(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    def summary(self) -> str:
        """For people: how many answers, by status."""
        return f"{len(self.answers)} answers: {dict(Counter(answer.status for answer in self.answers))}"
