"""The local socket between HTTP processes and the engine process: both of its ends.

Calls carry an id and are answered in any order; a caller that gives up sends `cancel`. When the connection breaks,
every call in flight fails at once, and the engine withdraws the jobs of the process that is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from typing import Any

from server.curve import Curve
from server.dial import AutoR, RSetting, Schedule, setting_from_json, setting_to_json
from server.errors import DeadlineError, EngineError, ServerError, UnavailableError
from server.ipc.frames import Frames
from server.metrics import ENGINE_UP
from server.types import Choice, Configuration, Engine, Explanation, Job, Merges, ModelInfo, Prediction, TopK

logger = logging.getLogger(__name__)

RECONNECT_S = 0.05
CALL_TIMEOUT_S = 12.0  # longer than the engine takes to say that a check failed


class RemoteEngine:
    """The engine as an HTTP process has it: behind a Unix socket, which it reconnects to for as long as it lives.

    Args:
        path: The socket.
        index: Which of the server's engines it is, for the metrics.
    """

    def __init__(self, path: str, index: int = 0) -> None:
        self._path, self._up = path, ENGINE_UP.labels(str(index))
        self._catalog: dict[str, ModelInfo] = {}
        self._frames: Frames | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()
        self._connection: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to connect; call it inside a running event loop."""
        self._connection = asyncio.create_task(self._stay_connected(), name="engine connection")

    async def close(self) -> None:
        """Leaves the engine."""
        assert self._connection is not None
        self._connection.cancel()
        await asyncio.wait([self._connection])

    @property
    def is_up(self) -> bool:
        """Whether it is connected, and has said what it serves."""
        return self._frames is not None and bool(self._catalog)

    @property
    def num_calls(self) -> int:
        """Calls of this process that it has not answered."""
        return len(self._calls)

    def catalog(self) -> dict[str, ModelInfo]:
        if not self._catalog:
            raise UnavailableError("the models are still loading", retry_after_s=1)
        return self._catalog

    async def classify(self, job: Job) -> Prediction:
        return _prediction(await self._call_for(job, "classify"))

    async def explain(self, job: Job) -> Explanation:
        answer = await self._call_for(job, "explain")
        merges = Merges(**{**answer["merges"], "grid": tuple(answer["merges"]["grid"])})
        return Explanation(_prediction(answer["prediction"]), merges)

    async def choose(self, model: str, bounds: AutoR) -> Choice:
        return _choice(await self._call("choose", {"model": model, "bounds": setting_to_json(bounds)}))

    async def curve(self, model: str) -> Curve:
        return Curve.model_validate(await self._call("curve", {"model": model}))

    async def configuration(self) -> Configuration:
        return Configuration.from_wire(await self._call("configuration", {}))

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        wire = {name: setting_to_json(r) for name, r in changes.items()}
        head = {"changes": wire, "expected_version": expected_version}
        return Configuration.from_wire(await self._call("configure", head))

    async def check(self) -> None:
        try:
            await self._call("check", {})
        except DeadlineError as error:
            raise UnavailableError(error.message, retry_after_s=1) from None

    async def _call_for(self, job: Job, operation: str) -> Any:
        r = None if job.r is None else setting_to_json(job.r)
        head = {"model": job.model, "r": r, "top_k": job.top_k, "timeout_s": job.timeout_s}
        head["jpeg_pixels"] = job.jpeg_pixels
        # The engine keeps the deadline; the second more is for an engine that no longer does.
        return await self._call(operation, head, job.pixels, timeout_s=job.timeout_s + 1)

    async def _call(
        self, operation: str, head: dict[str, Any], body: bytes = b"", timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        if self._frames is None:
            raise UnavailableError("the engine is not running", retry_after_s=1)
        call_id, frames = next(self._ids), self._frames
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            frames.send({"id": call_id, "call": operation, **head}, body)
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise DeadlineError(f"the engine did not answer within {timeout_s:.3g} s") from None
        except asyncio.CancelledError:
            frames.send({"id": call_id, "call": "cancel"})
            raise
        finally:
            del self._calls[call_id]

    async def _stay_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            is_lost = asyncio.Event()
            try:
                _, self._frames = await loop.create_unix_connection(
                    lambda is_lost=is_lost: Frames(self._receive, is_lost.set),  # type: ignore[misc]
                    self._path,
                )
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                continue
            try:
                await is_lost.wait()
                logger.warning("the connection to the engine broke; %d calls fail", len(self._calls))
            finally:
                self._up.set(0)
                frames, self._frames = self._frames, None
                frames.close()
                for future in self._calls.values():
                    if not future.done():
                        future.set_exception(UnavailableError("the engine went down", retry_after_s=1))
            await asyncio.sleep(RECONNECT_S)

    def _receive(self, head: dict[str, Any], body: bytes) -> None:
        """An answer, or the catalog, which the engine sends first."""
        if "catalog" in head:
            self._catalog = {wire["name"]: ModelInfo.from_wire(wire) for wire in head["catalog"]}
            self._up.set(1)
            return
        future = self._calls.get(head["id"])
        if future is None or future.done():
            return  # its caller gave up
        if "error" in head:
            future.set_exception(ServerError.from_wire(head["error"]))
        else:
            future.set_result(head["answer"])


class EngineServer:
    """An engine on a Unix socket, for any number of HTTP processes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._is_alone = asyncio.Event()
        self._is_alone.set()

    async def start(self, path: str) -> None:
        """Begins to listen."""

        def connect() -> Frames:
            connection = _Connection(self._engine, self._forget)
            self._connections.add(connection)
            self._is_alone.clear()
            return connection.frames

        self._server = await asyncio.get_running_loop().create_unix_server(connect, path)

    def close(self) -> None:
        """Takes no new connection."""
        assert self._server is not None
        self._server.close()

    async def left(self, within_s: float) -> None:
        """Returns when every HTTP process has left, or when the time is over."""
        try:
            async with asyncio.timeout(within_s):
                await self._is_alone.wait()
        except TimeoutError:
            logger.warning("%d HTTP processes have not left within %g s", len(self._connections), within_s)

    def _forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._is_alone.set()


async def serve_engine(engine: Engine, path: str) -> EngineServer:
    """Offers an engine on a Unix socket."""
    server = EngineServer(engine)
    await server.start(path)
    return server


class _Connection:
    """The engine's end of the connection of one HTTP process, and its calls in flight."""

    def __init__(self, engine: Engine, lost: Callable[[_Connection], None]) -> None:
        self._engine, self._lost = engine, lost
        self._calls: dict[int, asyncio.Task[None]] = {}
        catalog = [info.to_wire() for info in engine.catalog().values()]
        self.frames = Frames(self._receive, self._withdraw, greeting={"catalog": catalog})

    def _receive(self, head: dict[str, Any], body: bytes) -> None:
        call_id, operation = head.pop("id"), head.pop("call")
        if operation == "cancel":
            if call_id in self._calls:
                self._calls[call_id].cancel()
            return
        call = asyncio.ensure_future(_answer(self._engine, self.frames, call_id, operation, head, body))
        self._calls[call_id] = call
        call.add_done_callback(lambda _: self._calls.pop(call_id))

    def _withdraw(self) -> None:
        logger.info("an HTTP process left; %d of its calls are withdrawn", len(self._calls))
        for call in self._calls.values():
            call.cancel()
        self._lost(self)


async def _answer(
    engine: Engine, frames: Frames, call_id: int, operation: str, head: dict[str, Any], body: bytes
) -> None:
    try:
        reply = {"id": call_id, "answer": await _OPERATIONS[operation](engine, head, body)}
    except ServerError as error:
        reply = {"id": call_id, "error": error.to_wire()}
    except Exception as error:  # the caller must get an answer whatever broke
        logger.exception("call %r failed", operation)
        reply = {"id": call_id, "error": EngineError(f"the engine failed: {error!r}").to_wire()}
    frames.send(reply)


async def _classify(engine: Engine, head: dict[str, Any], body: bytes) -> dict[str, Any]:
    return _wire(await engine.classify(_job(head, body)))


async def _explain(engine: Engine, head: dict[str, Any], body: bytes) -> dict[str, Any]:
    explanation = await engine.explain(_job(head, body))
    return {"prediction": _wire(explanation.prediction), "merges": asdict(explanation.merges)}


async def _choose(engine: Engine, head: dict[str, Any], body: bytes) -> dict[str, Any]:
    bounds = setting_from_json(head["bounds"])
    assert isinstance(bounds, AutoR)
    return asdict(await engine.choose(head["model"], bounds))


async def _curve(engine: Engine, head: dict[str, Any], body: bytes) -> dict[str, Any]:
    return (await engine.curve(head["model"])).model_dump()


async def _configuration(engine: Engine, head: dict[str, Any], body: bytes) -> dict[str, Any]:
    return (await engine.configuration()).to_wire()


async def _configure(engine: Engine, head: dict[str, Any], body: bytes) -> dict[str, Any]:
    changes = {name: setting_from_json(r) for name, r in head["changes"].items()}
    return (await engine.configure(changes, head["expected_version"])).to_wire()


async def _check(engine: Engine, head: dict[str, Any], body: bytes) -> None:
    await engine.check()


_OPERATIONS: dict[str, Callable[[Engine, dict[str, Any], bytes], Coroutine[Any, Any, Any]]] = {
    "classify": _classify,
    "explain": _explain,
    "choose": _choose,
    "curve": _curve,
    "configuration": _configuration,
    "configure": _configure,
    "check": _check,
}


def _job(head: dict[str, Any], body: bytes) -> Job:
    said = head.pop("r")
    r: Any = None if said is None else setting_from_json(said)
    return Job(pixels=body, r=r, **head)


def _wire(prediction: Prediction) -> dict[str, Any]:
    """What `asdict` gives, in a tenth of its time: it copies every number."""
    wire = {name: getattr(prediction, name) for name in Prediction.__slots__}
    wire["top_k"] = {"indices": prediction.top_k.indices, "scores": prediction.top_k.scores}
    wire["auto"] = prediction.auto and asdict(prediction.auto)
    return wire


def _prediction(answer: dict[str, Any]) -> Prediction:
    auto = answer["auto"] and _choice(answer["auto"])
    schedule, top_k = tuple(answer["schedule"]), TopK(**answer["top_k"])
    return Prediction(**{**answer, "schedule": schedule, "top_k": top_k, "auto": auto})


def _choice(answer: dict[str, Any]) -> Choice:
    schedule: Schedule = tuple(answer["schedule"])
    return Choice(**{**answer, "schedule": schedule})
