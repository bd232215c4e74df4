"""The Open Inference Protocol v2 over gRPC, beside HTTP in the same process and event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote

import grpc
from fastapi import FastAPI
from google.protobuf import json_format
from starlette.concurrency import run_in_threadpool

from server.api.access import Service, check_admin, check_user
from server.api.asking import R_HEADER, Asking
from server.api.calls import Calls
from server.api.health import check_ready
from server.api.json_body import MOST_VALUES
from server.api.middleware import LARGEST_BODIES
from server.api.patience import at_most
from server.api.protocols.oip_infer import Inference, Inferred, Wanted, classification_of, infer, model_of
from server.api.protocols.oip_messages import SERVICE, message_class, read_message
from server.api.protocols.oip_models import config, metadata, server_metadata, statistics
from server.api.protocols.oip_tensors import Tensor, num_values
from server.api.repository import LOAD_PARAMETERS, UNLOAD_PARAMETERS, parameters_of, states, version_of
from server.errors import (
    ClientGoneError,
    NotFoundError,
    QueueFullError,
    ServerError,
    TooLargeError,
    UnavailableError,
    UndecodableError,
)
from server.settings import Settings
from server.types import ModelInfo

logger = logging.getLogger(__name__)

_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.ABORTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""gRPC's codes by HTTP status. All other statuses mean a wrong request."""

_PROBES = ("ServerLive", "ServerReady")

_LONGEST_DETAILS = 2048
"""Most characters of an error. It travels in a header, which clients limit."""

_BESIDE = 256
"""Calls besides those that wait for images, such as probes."""


Check = Callable[[Settings, Mapping[str, str]], None]
"""Raises an error if the headers of a call lack a required key."""


class Call:
    """One call, before its message is read.

    Args:
        kind: The name of its message.
        pieces: Its messages; there should be one.
        context: gRPC's context.
        limits: Its server, which limits the memory of all calls.

    Attributes:
        headers: Its metadata.
        size: Bytes of its message.
        r: The `r` that was used, once it is answered.
    """

    def __init__(self, kind: str, pieces: AsyncIterator[bytes], context: Any, limits: GrpcServer) -> None:
        self._start = time.monotonic()
        self._kind, self._pieces, self._context, self._limits = kind, pieces, context, limits
        self.headers: dict[str, str] = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        self.size = 0
        self.r: str | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds that its client still waits."""
        left: float | None = self._context.time_remaining()
        return left

    def all_of(self, key: str) -> list[str]:
        """Every value of a key of its metadata."""
        return [value for name, value in self._context.invocation_metadata() or () if name == key]

    async def read(self) -> Any:
        """Reads its message.

        Raises:
            UndecodableError: There is no message, or not one of its kind.
            TooLargeError: It has too many fields.
            QueueFullError: All calls together hold too many bytes.
            DeadlineError: It does not arrive in time.
        """
        async with at_most(self._limits.settings.deadline_s, since=self._start):
            piece = await anext(aiter(self._pieces), None)
        if piece is None:
            raise UndecodableError("the call has no message")
        self.size = len(piece)
        self._limits.hold(self.size)
        return read_message(self._kind, piece, MOST_VALUES + self._limits.settings.max_images)

    def answer_with(self, headers: Mapping[str, str]) -> None:
        """Sends headers after the answer."""
        self.r = headers.get(R_HEADER)
        self._context.set_trailing_metadata(tuple(headers.items()))


class GrpcServer:
    """The protocol's server in this process. Several processes may share one port.

    Args:
        app: The application, for its `state`.
        address: Its address, HOST:PORT.

    Attributes:
        port: Its port, once it has started.
    """

    def __init__(self, app: FastAPI, address: str) -> None:
        self._app, self._address = app, address
        self._service: Service = app.state.service
        self.settings = self._service.settings
        self.port = 0
        self._held = 0
        self._server: Any = None
        self._ending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to serve; raises RuntimeError if the address cannot be listened on."""
        settings = self.settings
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_connection_idle_ms", 1000 * settings.client_timeout_s),
            ),
            maximum_concurrent_rpcs=settings.max_queue_size + _BESIDE,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        self.port = self._server.add_insecure_port(self._address)
        await self._server.start()

    def begin_to_end(self, within_s: float) -> None:
        """Stops taking calls; running calls may continue for `within_s`."""
        if self._server is not None and self._ending is None:
            self._ending = asyncio.ensure_future(self._server.stop(within_s))

    async def ended(self) -> None:
        """Returns when all calls have ended."""
        self.begin_to_end(0)
        if self._ending is not None:
            await self._ending

    def hold(self, size: int) -> None:
        """Counts the bytes of a call; raises QueueFullError if all calls hold too many."""
        most = LARGEST_BODIES * self.settings.max_body_bytes
        self._held += size
        if self._held > most:
            raise QueueFullError(f"calls hold {self._held} bytes; at most {most} may be held at once", retry_after_s=1)

    def _handlers(self) -> dict[str, Any]:
        for_all = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._metadata,
        }
        for_users = {
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "ModelInfer": self._model_infer,
        }
        for_admins = {"RepositoryModelLoad": self._load, "RepositoryModelUnload": self._unload}
        checks = ((for_all, None), (for_users, check_user), (for_admins, check_admin))
        return {
            name: self._handler(name, method, check) for methods, check in checks for name, method in methods.items()
        }

    def _handler(self, name: str, method: Callable[[Call], Awaitable[Any]], check: Check | None) -> Any:
        """The handler of one kind of call. On the wire, a stream of one message equals that message.

        As a stream, the call reaches us before its message is complete, so its time can be limited.
        """

        async def answer(pieces: AsyncIterator[bytes], context: Any) -> bytes:
            call = Call(f"{name}Request", pieces, context, self)
            calls: Calls = self._app.state.calls
            probe = name in _PROBES
            with calls.note("grpc", f"/{SERVICE}/{name}", call.headers, _client(context), is_probe=probe) as noted:
                try:
                    if check is not None:
                        check(self.settings, call.headers)
                    said: bytes = (await method(call)).SerializeToString()
                    noted.r = call.r
                    return said
                except ClientGoneError:
                    raise asyncio.CancelledError from None
                except ServerError as error:
                    problem = error
                except Exception as error:
                    logger.error("a call of %s failed", name, exc_info=error)
                    problem = ServerError("the server failed; its log has the error")
                finally:
                    self._held -= call.size
                noted.error = problem
                await context.abort(
                    _CODES.get(problem.status, grpc.StatusCode.INVALID_ARGUMENT),
                    problem.message[:_LONGEST_DETAILS],
                    _retry_after(problem),
                )
            raise AssertionError("abort raises")

        return grpc.stream_unary_rpc_method_handler(answer)

    async def _live(self, call: Call) -> Any:
        await call.read()
        return _message("ServerLiveResponse", {"live": True})

    async def _ready(self, call: Call) -> Any:
        await call.read()
        return _message("ServerReadyResponse", {"ready": await self._is_ready()})

    async def _model_ready(self, call: Call) -> Any:
        try:
            await self._model(call)
        except NotFoundError:  # as Triton does: clients poll for a model that is being loaded
            return _message("ModelReadyResponse", {"ready": False})
        return _message("ModelReadyResponse", {"ready": await self._is_ready()})

    async def _is_ready(self) -> bool:
        try:
            await check_ready(self._app)
        except UnavailableError:
            return False
        return True

    async def _metadata(self, call: Call) -> Any:
        await call.read()
        return _message("ServerMetadataResponse", server_metadata())

    async def _model(self, call: Call) -> ModelInfo:
        said = await call.read()
        return model_of(self._service, said.name, said.version)

    async def _model_metadata(self, call: Call) -> Any:
        return _message("ModelMetadataResponse", metadata(await self._model(call)))

    async def _model_config(self, call: Call) -> Any:
        return _message("ModelConfigResponse", {"config": config(await self._model(call), self.settings.max_images)})

    async def _model_statistics(self, call: Call) -> Any:
        said = await call.read()
        models = [model_of(self._service, said.name, said.version)] if said.name else self._models()
        return _message("ModelStatisticsResponse", {"model_stats": await run_in_threadpool(statistics, models)})

    async def _repository_index(self, call: Call) -> Any:
        said = await call.read()
        found = await states({"ready": said.ready}, self._service.engine)
        return _message("RepositoryIndexResponse", {"models": [asdict(each) for each in found]})

    async def _load(self, call: Call) -> Any:
        name, parameters = await _of_model(call, LOAD_PARAMETERS)
        await self._service.engine.load(name, version_of(parameters.get("version")))
        return _message("RepositoryModelLoadResponse", {"model_name": name, "is_loaded": True})

    async def _unload(self, call: Call) -> Any:
        name, _ = await _of_model(call, UNLOAD_PARAMETERS)
        await self._service.engine.unload(name)
        return _message("RepositoryModelUnloadResponse", {"model_name": name, "is_unloaded": True})

    def _models(self) -> list[ModelInfo]:
        return list(self._service.engine.catalog().values())

    async def _model_infer(self, call: Call) -> Any:
        service = self._service
        with Asking(service, r=call.all_of(R_HEADER)) as asking:
            try:
                said = await call.read()
                info = model_of(service, said.model_name, said.model_version)
                most = self.settings.max_images * num_values(info.preprocessing)
                inferred = await infer(service, asking, info, _inference(said, call, most))
            except asyncio.CancelledError:
                raise ClientGoneError("the client has left the call") from None
        call.answer_with(inferred.answer.headers)
        return _answer(said.id, info, inferred)


async def _of_model(call: Call, known: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a model to load or unload."""
    said = await call.read()
    return said.model_name or said.repository_name, parameters_of({"parameters": _parameters(said)}, known)


def _client(context: Any) -> str:
    """The caller's address. gRPC writes it as ipv4:10.0.0.7:40312."""
    return unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")


def _message(name: str, said: dict[str, Any]) -> Any:
    return json_format.ParseDict(said, message_class(name)(), ignore_unknown_fields=True)


def _retry_after(problem: ServerError) -> tuple[tuple[str, str], ...]:
    if problem.status not in (429, 503):
        return ()
    return (("retry-after", str(max(1, math.ceil(problem.retry_after_s or 0)))),)


def _inference(said: Any, call: Call, most_values: int) -> Inference:
    """Parses the ModelInferRequest of a call.

    Raises:
        UndecodableError: Only some inputs have raw contents.
        TooLargeError: Lists hold too many values. They are counted before each becomes a Python object.
    """
    raw = said.raw_input_contents
    count = sum(len(_values(each)) for each in said.inputs)
    if count > most_values:
        raise TooLargeError(f"the contents hold {count} values; at most {most_values} are allowed")
    if raw and len(raw) != len(said.inputs):
        raise UndecodableError(f"raw_input_contents has {len(raw)} entries; there are {len(said.inputs)} inputs")
    return Inference(
        [
            Tensor(each.name, each.datatype, each.shape, raw[at] if raw else list(_values(each)))
            for at, each in enumerate(said.inputs)
        ],
        [Wanted(each.name, classification_of(_parameters(each))) for each in said.outputs],
        _parameters(said),
        call.left_s,
        call.size,
    )


def _values(tensor: Any) -> Sequence[Any]:
    """The values of an input that are not raw."""
    fields = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents"}
    values: Sequence[Any] = getattr(tensor.contents, fields.get(tensor.datatype, "bytes_contents"))
    return values


def _parameters(message: Any) -> dict[str, Any]:
    found = {}
    for name, parameter in message.parameters.items():
        kind = parameter.WhichOneof("value")
        if kind is not None:
            found[name] = getattr(parameter, kind)
    return found


def _answer(id: str, info: ModelInfo, inferred: Inferred) -> Any:
    """A ModelInferResponse. Its tensors are raw, because some clients read no others."""
    answer = message_class("ModelInferResponse")(model_name=info.name, model_version=info.version, id=id)
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in inferred.parameters.items():
        setattr(answer.parameters[name], kinds[type(value)], value)
    for output in inferred.outputs:
        answer.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        answer.raw_output_contents.append(output.raw)
    return answer
