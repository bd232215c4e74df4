"""`tome-server` with an engine that a test can break: python -m tests.e2e.faulty FOLDER serve ...

The model computes as ever, but minds files in FOLDER: while `hold` exists the device stands still; `room` says how many
images fit into its memory. A wholly white image makes a batch raise, and one of `DEADLY_GREY` ends the process.
`batches` has a line for each batch that it was given: its size and the process. The service itself knows nothing of
this.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from torch import Tensor

from server import cli, supervisor
from server import engine_process as process
from server.device.torch_backend import TorchBackend
from server.dial import Schedule
from server.lifetime import Pulse
from server.settings import Settings
from tests.e2e.clients import DEADLY_GREY


def run_engine(folder: Path, settings: Settings, socket_path: str, ready: Event, pulse: Pulse) -> None:
    """Runs the engine process, with a model that minds the folder."""
    compute = TorchBackend.logits

    def logits(self: TorchBackend, pixels: Tensor, schedule: Schedule) -> Tensor:
        with (folder / "batches").open("a") as file:
            file.write(f"{len(pixels)} {os.getpid()}\n")
        while (folder / "hold").exists():
            time.sleep(0.01)
        room = folder / "room"
        if room.exists() and len(pixels) > int(room.read_text()):
            raise torch.OutOfMemoryError("out of memory")
        if (pixels == DEADLY_GREY).flatten(1).all(dim=1).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if (pixels == 255).flatten(1).all(dim=1).any():
            raise ValueError("a white image")
        return compute(self, pixels, schedule)

    TorchBackend.logits = logits  # type: ignore[method-assign]
    process.main(settings, socket_path, ready, pulse)


if __name__ == "__main__":
    supervisor._run_engine = functools.partial(run_engine, Path(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
