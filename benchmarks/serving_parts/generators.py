"""Several load generators at once, each a process with its own loop and connections, and their sum."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Self

import uvloop

from server.bench.client import Connections, Target
from server.bench.load import Reply, Request, closed_loop, open_loop, poisson
from server.bench.rows import LAG_S, percentile

START_IN_S = 0.3  # by then all of them have their orders
TIMEOUT_S = 60.0

During = Sequence[tuple[float, Callable[[], object]]]
"""Actions during a load, each with its time in seconds from the start, ascending."""


@dataclass(frozen=True)
class Order:
    """The work of a generator.

    Attributes:
        requests: Used in turn.
        clients: Number of waiting clients; 0 in an open loop.
        per_s: Rate of an open loop.
        warmup_s: Seconds before the measured ones.
        seed: Seed for the times of an open loop.
        starts_at: Start, on the clock that all processes share.
    """

    target: Target
    requests: Sequence[Request]
    headers: Mapping[str, str]
    clients: int
    per_s: float
    warmup_s: float
    seconds: float
    seed: int = 0
    starts_at: float = 0.0


@dataclass(frozen=True)
class Share:
    """The results of one generator in the measured seconds.

    Attributes:
        latencies: Seconds of the answers with 200.
        statuses: Count of each status; 0 is no answer.
        problems: An example message for each status except 200.
        lateness_s: 99th percentile of the generator's lateness.
        cpu_us: The generator's CPU time a request.
    """

    latencies: array[float]
    statuses: Counter[int]
    problems: dict[int, str]
    lateness_s: float
    cpu_us: float


@dataclass(frozen=True)
class Load:
    """The sum of the generators' results.

    Attributes:
        answered: Requests answered with 200.
        others: All others.
        generator_us: A generator's CPU time a request.
    """

    seconds: float
    answered: int
    others: int
    p50_ms: float | None
    p99_ms: float | None
    lateness_ms: float
    generator_us: float
    statuses: dict[int, int]
    problems: dict[int, str]

    @property
    def per_s(self) -> float:
        """Answers with 200 a second."""
        return self.answered / self.seconds

    @property
    def lagged(self) -> bool:
        """Whether the generators distort the latencies: one was late by more than 2 ms and a tenth of the p99."""
        return self.lateness_ms > max(1e3 * LAG_S, 0.1 * (self.p99_ms or 0.0))

    def require_answers(self) -> None:
        """Raises RuntimeError if nothing was answered with 200, because there is nothing to divide by."""
        if not self.answered:
            raise RuntimeError(f"nothing was answered with 200: {self.problems or 'no reply at all'}")


def sum_of(shares: Sequence[Share], seconds: float) -> Load:
    """Sums the results of several generators."""
    latencies = sorted(each for share in shares for each in share.latencies)
    statuses: Counter[int] = Counter()
    for share in shares:
        statuses += share.statuses
    p50, p99 = (percentile(latencies, part) for part in (0.5, 0.99))
    return Load(
        seconds=seconds,
        answered=len(latencies),
        others=statuses.total() - statuses[200],
        p50_ms=None if p50 is None else 1e3 * p50,
        p99_ms=None if p99 is None else 1e3 * p99,
        lateness_ms=1e3 * max(share.lateness_s for share in shares),
        generator_us=sum(share.cpu_us for share in shares) / len(shares),
        statuses=dict(statuses),
        problems={status: said for share in shares for status, said in share.problems.items()},
    )


class Generators:
    """Processes that send requests. They end with the `with` block.

    Args:
        count: Number of processes.
    """

    def __init__(self, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._seed = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = spawn.Pipe()
            self._pipes.append(ours)
            self._processes.append(spawn.Process(target=_generate, args=(theirs,), daemon=True))
            self._processes[-1].start()
            theirs.close()

    def run(self, order: Order, during: During = ()) -> Load:
        """Distributes an order among all generators, and runs actions meanwhile.

        Raises:
            RuntimeError: A generator failed.
        """
        pipes = self._pipes[: order.clients] if order.clients else self._pipes
        starts_at = time.monotonic() + START_IN_S
        for pipe, part in zip(pipes, shared(order, len(pipes)), strict=True):
            self._seed += 1
            pipe.send(replace(part, seed=self._seed, starts_at=starts_at))
        failure: Exception | None = None
        for at, do in during:
            time.sleep(max(0.0, starts_at + at - time.monotonic()))
            try:
                do()
            except Exception as error:  # then wait for the generators, because the next load must not get these answers
                failure = error
        shares = [pipe.recv() for pipe in pipes]
        if failure is not None:
            raise failure
        for share in shares:
            if isinstance(share, str):
                raise RuntimeError(f"a load generator failed: {share}")
        return sum_of(shares, order.seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()


def shared(order: Order, count: int) -> list[Order]:
    """The parts of an order for several generators. They begin at different photos."""
    parts = []
    for number in range(count):
        clients = order.clients // count + (number < order.clients % count)
        first = number * len(order.requests) // count
        requests = [*order.requests[first:], *order.requests[:first]]
        parts.append(replace(order, requests=requests, clients=clients, per_s=order.per_s / count))
    return parts


def _generate(pipe: Connection) -> None:
    """A generator process: sends orders until the pipe closes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the process group is for the benchmark, which ends us
    gc.disable()  # a collection among a hundred thousand replies would be a pause that is not the server's
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(uvloop.run(_send(order)))
        except Exception as error:
            pipe.send(repr(error))
        gc.collect()


async def _send(order: Order) -> Share:
    latencies, statuses, problems = array("d"), Counter[int](), dict[int, str]()
    is_open = not order.clients
    async with Connections(order.target, TIMEOUT_S, order.headers) as client:
        await asyncio.sleep(order.starts_at - time.monotonic())
        start = time.perf_counter() + order.warmup_s
        end = start + order.seconds

        def watch(reply: Reply) -> None:
            # In a closed loop, the answers that arrive in the measured time; in an open loop, the requests due in it.
            now = time.perf_counter()
            if start <= (now - reply.seconds if is_open else now) < end:
                statuses[reply.status] += 1
                if reply.status == 200:
                    latencies.append(reply.seconds)
                else:
                    problems[reply.status] = str(reply.said)

        cpu, in_all = time.process_time(), order.warmup_s + order.seconds
        if is_open:
            run = await open_loop(client, order.requests, poisson(order.per_s, in_all, order.seed), watch=watch)
        else:
            run = await closed_loop(client, order.requests, order.clients, in_all, watch=watch)
        cpu_us = 1e6 * (time.process_time() - cpu) / max(1, len(run.replies))
    return Share(latencies, statuses, problems, percentile(sorted(run.lateness_s), 0.99) or 0.0, cpu_us)
