"""Ours around a model that costs nothing: what HTTP, decoding, the queue and the socket between processes take."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
from collections.abc import Sequence

import uvloop

from server.images.preprocessing import Preprocessing
from server.types import BatchKey, Job, Merges, ModelInfo, TopK

SIDE = 32  # pixels


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # as the supervisor has it
        listener = socket.create_server(("127.0.0.1", int(os.environ.get("PEER_PORT", "8000"))), backlog=2048)
        socket_path = os.path.join(folder, "engine.sock")
        told_to_end: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: told_to_end.append(number))
        processes = [
            spawn.Process(target=_engine, args=(socket_path,)),
            spawn.Process(target=_http, args=(listener, socket_path)),
        ]
        for process in processes:
            process.start()
        while not told_to_end:
            if multiprocessing.connection.wait([process.sentinel for process in processes], timeout=0.2):
                break  # one died, and the other is worth nothing without it
        for process in reversed(processes):
            process.terminate()
            process.join()


def _http(listener: socket.socket, socket_path: str) -> None:
    from server.api import process
    from server.lifetime import Pulse
    from server.settings import Settings

    process.main(Settings.model_validate({"log_level": "warning"}), listener, [socket_path], Pulse())


def _engine(socket_path: str) -> None:
    uvloop.run(_serve(socket_path))


async def _serve(socket_path: str) -> None:
    from server.batching.engine import LocalEngine
    from server.config.local import LocalConfig
    from server.ipc.transport import serve_engine

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
    )
    engine = LocalEngine({"free": info}, _classify, LocalConfig({"free": 0}), explain_batch=_explain)
    engine.start()
    server = await serve_engine(engine, socket_path)
    await told_to_end.wait()
    server.close()
    await engine.close()


def _classify(key: BatchKey, jobs: Sequence[Job]) -> list[TopK]:
    return [TopK(list(range(job.top_k)), [1 / job.top_k] * job.top_k) for job in jobs]


def _explain(key: BatchKey, jobs: Sequence[Job]) -> list[tuple[TopK, Merges]]:
    raise NotImplementedError("nothing merges in a model that is none")


if __name__ == "__main__":
    main()
