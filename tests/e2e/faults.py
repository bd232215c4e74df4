"""A service that a test can break, and what it then wants to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.e2e.clients import classify, png
from tests.e2e.service import Service


class Faulty:
    """A service whose engines a test can break, through the folder of `faulty.py`.

    Args:
        folder: For all that it writes.
        flags: Its settings.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self._folder = folder / "faults"
        self._folder.mkdir()
        flags = ("--deadline-s", "60", *flags)  # on a busy machine a deadline would make batches smaller
        self.service = Service(*flags, state_dir=folder / "state", faults=self._folder)
        self.service.wait_until_ready()
        self._batches_before, self._queued_before, self._metrics_before = 0, 0, dict[str, float]()

    def batches(self) -> list[int]:
        """Sizes of the batches that the model was given since `mark`."""
        return [int(line.split()[0]) for line in self._lines("batches")[self._batches_before :]]

    def computing(self) -> set[int]:
        """Processes that have been given a batch since `mark`."""
        return {int(line.split()[1]) for line in self._lines("batches")[self._batches_before :]}

    def _lines(self, name: str) -> list[str]:
        file = self._folder / name
        return file.read_text().splitlines() if file.exists() else []

    def mark(self) -> None:
        """What is counted is counted from here."""
        self._batches_before, self._queued_before = len(self._lines("batches")), len(self._lines("queued"))
        self._metrics_before = self.service.metrics()

    def counted(self, sample: str) -> float:
        """How far a metric has gone since `mark`."""
        return self.service.metrics().get(sample, 0.0) - self._metrics_before.get(sample, 0.0)

    @contextmanager
    def hold(self) -> Iterator[Future[httpx.Response]]:
        """Keeps a device busy with one photo, whose answer is given; what is sent meanwhile queues."""
        self.mark()
        (self._folder / "hold").touch()
        with ThreadPoolExecutor(1) as pool:
            try:
                blocker = pool.submit(classify, self.service, png(1))
                self.service.until(lambda: self.batches() == [1])
                yield blocker
            finally:
                (self._folder / "hold").unlink()

    def until_queued(self, images: int) -> None:
        """Returns once so many images have come into an engine's queue, the one that holds the device among them."""
        self.service.until(lambda: len(self._lines("queued")) - self._queued_before == images)

    def room(self, images: int | None) -> None:
        """So many images fit into the device's memory; None for any number."""
        file = self._folder / "room"
        file.unlink(missing_ok=True)
        if images is not None:
            file.write_text(str(images))
