"""What every process of the service does first: logs alike, leaves Ctrl-C to the supervisor, and ends with it."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def configure_logging(level: str) -> None:
    """One line an event, on standard error, with the process it comes from."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(processName)s: %(message)s", force=True
    )


def end_with_parent() -> None:
    """In a child process: leaves Ctrl-C to the supervisor (uvicorn minds it too), and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
