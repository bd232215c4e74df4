"""Our server around a model that costs nothing: the time of HTTP, decoding, the queue and the socket between processes.

With PEER_DECODES=1 its engine takes JPEG files, like one on a GPU; then nothing is decoded.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
from collections.abc import Sequence

import uvloop

from server.api.accept import Places
from server.images.preprocessing import Preprocessing
from server.ipc.door import Door
from server.ipc.messages import Classify, Item, TopK
from server.shared_values import Sheet, join
from server.types import BatchKey, Compiling, ComputedBy, ModelInfo

SIDE = 32  # pixels


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    listener = socket.create_server(("127.0.0.1", int(os.environ.get("PEER_PORT", "8000"))), backlog=2048)
    told_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told_to_end.append(number))
    places, door = Places(int(os.environ.get("PEER_HTTP", "1"))), Door()
    sheets = [Sheet() for _ in range(1 + len(places.held()))]  # as in the supervisor
    processes = [spawn.Process(name="engine", target=_engine, args=(sheets, door))]
    for number in range(len(places.held())):
        args = (sheets, listener, door, places, number)
        processes.append(spawn.Process(name=f"http-{number}", target=_http, args=args))
    for process in processes:
        process.start()
        print(f"{process.name} is process {process.pid}", flush=True)
    while not told_to_end:
        if multiprocessing.connection.wait([process.sentinel for process in processes], timeout=0.2):
            break  # one died, and the others are useless without it
    for process in reversed(processes):
        process.terminate()
        process.join()


def _http(sheets: Sequence[Sheet], listener: socket.socket, door: Door, places: Places, index: int) -> None:
    join(sheets, 1 + index)
    from server.api import process
    from server.lifetime import Pulse
    from server.settings import Settings

    settings = Settings.model_validate({"log_level": "warning"})
    process.main(settings, listener, [door], places, index, Pulse())


def _engine(sheets: Sequence[Sheet], door: Door) -> None:
    join(sheets, 0)
    uvloop.run(_serve(door))


async def _serve(door: Door) -> None:
    from server.batching.engine import LocalEngine
    from server.config.local import LocalConfig
    from server.ipc.server import EngineServer

    told_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    half = (0.5, 0.5, 0.5)
    info = ModelInfo(
        name="free",
        architecture="none",
        source="none",
        labels=tuple(map(str, range(10))),
        preprocessing=Preprocessing((SIDE, SIDE), (SIDE, SIDE), "center", "bicubic", half, half),
        num_blocks=12,
        num_tokens=197,
        num_prefix_tokens=1,
        max_r=16,
        decodes_jpeg=os.environ.get("PEER_DECODES") == "1",
    )
    engine = LocalEngine({"free": info}, _Free(), LocalConfig({"free": 0}))
    engine.start()
    server = EngineServer(engine, door)
    await told_to_end.wait()
    server.close()
    await engine.close()


class _Free:
    """A device that answers without computing."""

    prepares = False

    def prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def compute(self, key: BatchKey, work: Sequence[Item]) -> list[TopK]:
        requests = [item.request for item in work]
        ks = [request.top_k for request in requests if isinstance(request, Classify)]
        return [TopK(list(range(k)), [1 / k] * k) for k in ks]

    def computed_by(self, key: BatchKey) -> ComputedBy:
        return ComputedBy("torch", "fp32")

    def compiling(self, info: ModelInfo) -> Compiling | None:
        return None

    def begin(self, info: ModelInfo, on_device: object, timed: object) -> None:
        pass

    def close(self) -> None:
        pass

    def check(self) -> None:
        pass

    def warm_further(self) -> bool:
        return False


if __name__ == "__main__":
    main()
