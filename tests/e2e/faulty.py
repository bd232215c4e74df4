"""`tome-server` with an engine that a test can break: python -m tests.e2e.faulty FOLDER serve ...

The model computes as ever, but minds files in FOLDER: while `hold` exists the device stands still; `room` says how many
images fit into its memory. A wholly white image makes a batch raise, and one of `DEADLY_GREY` ends the process.
`batches` has a line for each batch that it was given: its size and the process; `queued` one for each image that the
engine has put into a queue. The service itself knows nothing of this.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server import cli, supervisor
from server.dial import Schedule
from server.shared_values import Sheet, join
from tests.e2e.clients import DEADLY_GREY

if TYPE_CHECKING:
    from torch import Tensor


def run_engine(folder: Path, sheets: Sequence[Sheet], sheet: int, *args: Any) -> None:
    """Runs the engine process, with a model that minds the folder."""
    join(sheets, sheet)
    import torch

    from server import engine_process as process  # which has metrics
    from server.batching.queues import Queues
    from server.device.torch_backend import TorchBackend

    compute, add = TorchBackend.outputs, Queues.add

    def queue(self: Any, asked: Any, key: Any) -> None:
        add(self, asked, key)
        with (folder / "queued").open("a") as file:
            file.write("an image\n" * len(asked.jobs))

    def outputs(self: Any, pixels: Tensor, schedule: Schedule) -> Tensor:
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

    TorchBackend.outputs = outputs  # type: ignore[method-assign]
    Queues.add = queue  # type: ignore[method-assign]
    process.main(*args)


if __name__ == "__main__":
    supervisor._run_engine = functools.partial(run_engine, Path(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
