"""The process that translates a model for OpenVINO while the server answers. It may be killed at any time."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from multiprocessing import resource_tracker

from server.images.decoder_process import environment

_PROGRAM = "from server.device.translation import main; main()"
_LENGTH_BYTES = 8


def start() -> subprocess.Popen[bytes]:
    """Starts a process, which imports its modules and waits for work.

    It is no process of `multiprocessing`, whose `start` blocks until the new process has read its arguments.
    """
    return subprocess.Popen([sys.executable, "-P", "-c", _PROGRAM], stdin=subprocess.PIPE, env=environment())


def finish(process: subprocess.Popen[bytes], work: bytes) -> int:
    """Sends the pickled arguments of `openvino_compiler.translate` to a process, and waits for its end.

    Returns:
        Its exit status; negative if a signal ended it.
    """
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it was killed; its status tells
        process.stdin.write(len(work).to_bytes(_LENGTH_BYTES, "big"))
        process.stdin.write(work)  # apart: together they would be one more copy of the weights
        process.stdin.flush()
    status = process.wait()  # the input stays open, because the process ends with it
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return status


def main() -> None:
    """Translates the model in the input. Ends at once if the input ends, because then the server has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a signal to the process group is for the supervisor
        signal.signal(number, signal.SIG_IGN)
    # Packages that torch imports make semaphores. Python would warn of them if this process was killed.
    resource_tracker.register = lambda name, rtype: None
    resource_tracker.unregister = lambda name, rtype: None
    work = sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(_LENGTH_BYTES), "big"))
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    from server.device.openvino_compiler import translate

    try:
        args = pickle.loads(work)
    except (EOFError, pickle.UnpicklingError):  # the input has ended too early
        os._exit(1)
    translate(*args)


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # `sys.stdin.buffer.read` holds a lock, without which Python aborts at its end
    os._exit(1)
