"""Mosec: a stage that decodes, with a process for each core, and a stage that batches for up to 10 ms, its default.

The program has its own flags: `--port N --address 127.0.0.1 --timeout MS`.
"""

from __future__ import annotations

import os
from typing import Any

from mosec import Server, Worker

from benchmarks.peers.model import BATCH, Model


class Decode(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> bytes:
        return self.model.decode(data)


class Classify(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def forward(self, data: list[bytes]) -> Any:
        return [{"top_k": top_k} for top_k in self.model.classify(data)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=os.cpu_count() or 1)
    server.append_worker(Classify, max_batch_size=BATCH, max_wait_time=10)
    server.run()
