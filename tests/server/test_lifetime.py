"""What every process does first, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import atexit, gc
atexit.register(lambda: print("frozen at the end:", gc.get_freeze_count()))
from server.lifetime import spare_the_collector
spare_the_collector()
print("frozen:", gc.get_freeze_count() > 1000, "threshold:", gc.get_threshold()[0])
"""


LEAVING = """
import atexit, threading
from server.lifetime import leave
atexit.register(lambda: print("done at the exit", flush=True))
threading.Thread(target=threading.Event().wait).start()  # as one that compiles, which nobody can break off
leave(3)
"""


def test_a_process_that_leaves_waits_for_no_thread() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done at the exit\n", "")


def test_the_collector_is_spared_while_a_process_lives_and_has_all_back_at_its_end() -> None:
    """What is frozen at the end is never freed, and bindings report it as leaked."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["frozen: True threshold: 20000", "frozen at the end: 0"]
