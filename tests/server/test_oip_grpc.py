"""The Open Inference Protocol by gRPC, with a fake device behind a real port."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.access_log import AccessLog
from server.api.protocols.oip_grpc import GrpcServer
from server.api.protocols.oip_messages import SERVICE, message_class
from tests.server.conftest import NUM_CLASSES, SIDE, FakeDevice, grey_png, model_info, until
from tests.server.fake_loader import FakeLoader, loading
from tests.server.oip import C, activated, features_of, logits_of, oip_serving

PNG = grey_png(100)
PACKED = struct.pack("<I", len(PNG)) + PNG
ModelParameter = message_class("ModelRepositoryParameter")
PIXELS = bytes([100]) * (SIDE * SIDE * 3)
PLAIN = (0, 0, 0)


class Client:
    """Calls of a server by our own messages."""

    def __init__(self, channel: Any, app: Any, device: FakeDevice, server: GrpcServer) -> None:
        self.channel, self.app, self.device, self.server = channel, app, device, server

    def call(self, rpc: str, said: Any = None, *, metadata: Iterable[tuple[str, str]] = (), **options: Any) -> Any:
        message = message_class(f"{rpc}Request")(**(said or {})) if not isinstance(said, bytes) else said
        encoded = message if isinstance(message, bytes) else message.SerializeToString()
        method = self.channel.unary_unary(
            f"/{SERVICE}/{rpc}", response_deserializer=message_class(f"{rpc}Response").FromString
        )
        return method(encoded, metadata=tuple(metadata), **options)

    async def refused(self, code: grpc.StatusCode, rpc: str, said: Any = None, **options: Any) -> Any:
        """The error of a call that is refused with this code."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(rpc, said, **options)
        assert caught.value.code() is code, caught.value
        return caught.value

    @property
    def in_flight(self) -> int:
        in_flight: int = self.app.state.service.admission.in_flight
        return in_flight


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Client]:
    async with oip_serving(**settings) as service:
        server = GrpcServer(service.app, "127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Client(channel, service.app, service.device, server)
        service.device.gate.set()
        await server.ended()


def parameter(value: Any) -> Any:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    return message_class("InferParameter")(**{kinds[type(value)]: value})


def asking(
    datatype: str = "BYTES",
    shape: Sequence[int] = (1,),
    raw: bytes | None = PACKED,
    *,
    contents: dict[str, Any] | None = None,
    outputs: Sequence[tuple[str, dict[str, Any]]] = (),
    **parameters: Any,
) -> dict[str, Any]:
    """A ModelInferRequest."""

    def named(said: dict[str, Any]) -> dict[str, Any]:
        return {name: parameter(value) for name, value in said.items()}

    tensor: dict[str, Any] = {"name": "image", "datatype": datatype, "shape": shape}
    if contents is not None:
        tensor["contents"] = message_class("InferTensorContents")(**contents)
    return {
        "model_name": "tiny",
        "inputs": [message_class("InferInputTensor")(**tensor)],
        "outputs": [
            message_class("InferRequestedOutputTensor")(name=name, parameters=named(said)) for name, said in outputs
        ],
        "raw_input_contents": [] if raw is None else [raw],
        "parameters": named(parameters),
    }


def numbers(raw: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


async def test_the_server_and_its_models_tell_what_they_are() -> None:
    async with serving(models=[model_info(num_features=C), model_info("other", labels=())]) as client:
        assert (await client.call("ServerLive")).live and (await client.call("ServerReady")).ready
        for version in ("", "1"):
            said = {"name": "tiny", "version": version}
            assert (await client.call("ModelReady", said)).ready
            metadata = await client.call("ModelMetadata", said)
            assert (metadata.name, list(metadata.versions), metadata.platform) == ("tiny", ["1"], "timm")
            assert [(each.name, each.datatype, list(each.shape)) for each in metadata.inputs] == [
                ("image", "BYTES", [-1, 1])
            ]
            assert [(each.name, list(each.shape)) for each in metadata.outputs] == [
                ("probabilities", [-1, NUM_CLASSES]),
                ("logits", [-1, NUM_CLASSES]),
                ("embedding", [-1, C]),
            ]
            config = (await client.call("ModelConfig", said)).config
            assert (config.max_batch_size, config.input[0].data_type, list(config.output[2].dims)) == (32, 13, [C])
            assert config.HasField("dynamic_batching")
            assert config.parameters["std"].string_value == "0.5,0.5,0.5"
        assert (await client.call("ServerMetadata")).name == "tome-server"
        index = await client.call("RepositoryIndex")
        assert [(each.name, each.version, each.state) for each in index.models] == [
            ("tiny", "1", "READY"),
            ("other", "1", "READY"),
        ]


def inputs() -> dict[str, dict[str, Any]]:
    """The same image in all forms."""
    levels = np.frombuffer(PIXELS, np.uint8).reshape(1, SIDE, SIDE, 3).transpose(0, 3, 1, 2) / 255
    values = np.ascontiguousarray((levels - 0.5) / 0.5, "<f4")
    rgb, normalised = (1, SIDE, SIDE, 3), (1, 3, SIDE, SIDE)
    text = base64.b64encode(PNG)
    return {
        "file": asking(),
        "file with a second axis": asking(shape=(1, 1)),
        "contents": asking(raw=None, contents={"bytes_contents": [PNG]}),
        "base64": asking(raw=None, contents={"bytes_contents": [text]}),
        "pixels": asking("UINT8", rgb, PIXELS),
        "pixels as contents": asking("UINT8", rgb, None, contents={"uint_contents": list(PIXELS)}),
        "normalised": asking("FP32", normalised, values.tobytes()),
        "normalised as contents": asking("FP32", normalised, None, contents={"fp32_contents": values.ravel()}),
    }


@pytest.mark.parametrize("form", inputs())
async def test_every_form_of_input_gives_the_same_answer(form: str) -> None:
    async with serving() as client:
        call = client.call("ModelInfer", inputs()[form] | {"id": "42"}, metadata=[("x-r", "2")])
        answer = await call
        assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "1", "42")
        (output,) = answer.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("probabilities", "FP32", [1, NUM_CLASSES])
        expected = activated(logits_of(PIXELS, (2, 2, 2)), "softmax")
        assert numbers(answer.raw_output_contents[0]) == pytest.approx(expected, rel=1e-5)
        assert answer.parameters["r"].int64_param == 2
        assert answer.parameters["r_source"].string_param == "request"
        assert answer.parameters["batch_size"].int64_param == 1
        assert dict(await call.trailing_metadata())["x-r"] == "2"


async def test_outputs_come_as_they_were_asked_for() -> None:
    async with serving() as client:
        outputs = [("embedding", {}), ("logits", {}), ("probabilities", {"classification": 2})]
        answer = await client.call("ModelInfer", asking(outputs=outputs, r="2,1"))
        assert [each.name for each in answer.outputs] == ["embedding", "logits", "probabilities"]
        embedding, logits, classes = answer.raw_output_contents
        schedule = (2, 1, 0)
        assert numbers(embedding) == features_of(PIXELS, schedule)
        assert numbers(logits) == logits_of(PIXELS, schedule)
        assert list(answer.outputs[2].shape) == [1, 2] and answer.outputs[2].datatype == "BYTES"
        (length,) = struct.unpack_from("<I", classes)
        score, best, label = classes[4 : 4 + length].decode().split(":")
        assert int(best) == logits_of(PIXELS, schedule).index(0) and label == f"label {best}" and 0 < float(score) < 1
        assert answer.parameters["r"].string_param == "2,1,0"


@pytest.mark.parametrize(("datatype", "field"), [("UINT8", "uint_contents"), ("FP32", "fp32_contents")])
async def test_contents_of_too_many_values_are_refused_before_they_are_listed(datatype: str, field: str) -> None:
    most = 32 * SIDE * SIDE * 3
    async with serving() as client:
        said = asking(datatype, [1, SIDE, SIDE, 3], None, contents={field: [1] * (most + 1)})
        error = await client.refused(grpc.StatusCode.INVALID_ARGUMENT, "ModelInfer", said)
        assert f"hold {most + 1} values; at most {most}" in error.details()


async def test_the_dial_is_said_once_in_the_metadata() -> None:
    async with serving() as client:
        metadata = [("x-r", "2"), ("x-r", "4")]
        error = await client.refused(grpc.StatusCode.INVALID_ARGUMENT, "ModelInfer", asking(), metadata=metadata)
        assert "'2' and '4' in two headers x-r" in error.details()


@pytest.mark.parametrize(
    ("said", "code", "part"),
    [
        ({"model_name": "none"}, "NOT_FOUND", "there is no model 'none'"),
        ({"model_version": "2"}, "NOT_FOUND", "no version '2'"),
        ({"inputs": []}, "INVALID_ARGUMENT", "1 entries; there are 0 inputs"),
        ({"inputs": [], "raw_input_contents": []}, "INVALID_ARGUMENT", "has 0 inputs"),
        ({"raw_input_contents": [PACKED, b""]}, "INVALID_ARGUMENT", "2 entries"),
        ({"raw_input_contents": [PNG]}, "INVALID_ARGUMENT", "ends in its element 0"),
        ({"raw_input_contents": []}, "INVALID_ARGUMENT", "0 values"),
        ({"parameters": {"q": parameter(1)}}, "INVALID_ARGUMENT", "there is no parameter 'q'"),
        ({"parameters": {"r": parameter(99)}}, "INVALID_ARGUMENT", "between 0 and 8"),
        ({"parameters": {"min_agreement": parameter(float("nan")), "r": parameter("auto")}}, "INVALID_ARGUMENT", "nan"),
        (asking(shape=[33]), "INVALID_ARGUMENT", "at most 32"),
        (asking(outputs=[("logits", {"classification": -1})]), "INVALID_ARGUMENT", "from 1"),
    ],
)
async def test_what_is_wrong_is_refused_with_its_code(said: dict[str, Any], code: str, part: str) -> None:
    async with serving() as client:
        error = await client.refused(grpc.StatusCode[code], "ModelInfer", asking() | said)
        assert part in error.details()


async def test_a_full_server_says_when_to_come_back() -> None:
    async with serving(max_queue_size=1) as client:
        with client.app.state.service.admission.permit(1, 1.0):
            error = await client.refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "ModelInfer", asking())
        assert int(dict(error.trailing_metadata())["retry-after"]) >= 1


async def test_what_breaks_is_not_told_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as client:
        client.app.state.service.engine.answer = None  # nothing that can be called
        error = await client.refused(grpc.StatusCode.INTERNAL, "ModelInfer", asking())
        assert error.details() == "the server failed; its log has the error"
        assert "a call of ModelInfer failed" in caplog.text


async def test_a_call_has_a_line_in_the_log_with_its_r_or_its_error() -> None:
    lines: list[str] = []
    async with serving(access_log=AccessLog(lines.append, "json")) as client:
        await client.call("ModelInfer", asking(r=4), metadata=[("x-request-id", "mine")])
        await client.refused(grpc.StatusCode.NOT_FOUND, "ModelMetadata", {"name": "huge"})
        await client.call("ServerLive")
        await until(lambda: "".join(lines).count("\n") == 2)
    answered, refused = (json.loads(line) for line in "".join(lines).splitlines())
    assert answered["message"] == f"GRPC /{SERVICE}/ModelInfer 200"
    assert (answered["r"], answered["request_id"], answered["client"]) == ("4", "mine", "127.0.0.1")
    assert refused["message"] == f"GRPC /{SERVICE}/ModelMetadata 404"


async def test_models_are_loaded_and_unloaded_as_either_client_asks() -> None:
    async with loading(FakeDevice(), FakeLoader()) as engine, serving(engine=engine, admin_key="admin-key") as client:
        admin = [("x-api-key", "admin-key")]
        triton = {"model_name": "cats", "parameters": {"version": ModelParameter(string_param="1")}}
        for said in (triton, {"repository_name": "cats"}):  # KServe's client has the name in that field
            await client.refused(grpc.StatusCode.PERMISSION_DENIED, "RepositoryModelLoad", said)
            assert (await client.call("RepositoryModelLoad", said, metadata=admin)).is_loaded
            assert (await client.call("ModelReady", {"name": "cats"})).ready
            index = await client.call("RepositoryIndex", {"ready": True})
            assert [each.name for each in index.models] == ["tiny", "cats"]
            named = {name: value for name, value in said.items() if name != "parameters"}
            assert (await client.call("RepositoryModelUnload", named, metadata=admin)).is_unloaded
            assert not (await client.call("ModelReady", {"name": "cats"})).ready
        wrong = {"model_name": "cats", "parameters": {"config": ModelParameter(string_param="{}")}}
        error = await client.refused(grpc.StatusCode.INVALID_ARGUMENT, "RepositoryModelLoad", wrong, metadata=admin)
        assert "there are: version" in error.details()


async def test_keys_are_needed_but_for_health() -> None:
    async with serving(api_key="user-key") as client:
        named = {"name": "tiny"}
        for rpc, said in (("ServerLive", {}), ("ServerReady", {}), ("ServerMetadata", {}), ("ModelReady", named)):
            await client.call(rpc, said)
        for rpc, said in (
            ("ModelMetadata", named),
            ("ModelConfig", named),
            ("ModelStatistics", named),
            ("RepositoryIndex", {}),
            ("ModelInfer", asking()),
        ):
            for metadata in ([], [("x-api-key", "wrong")], [("authorization", "user-key")]):
                error = await client.refused(grpc.StatusCode.UNAUTHENTICATED, rpc, said, metadata=metadata)
                assert "API key" in error.details()
            for good in (("x-api-key", "user-key"), ("authorization", "Bearer user-key")):
                await client.call(rpc, said, metadata=[good])


async def test_statistics_grow() -> None:
    async with serving(models=[model_info("by-grpc", num_features=C), model_info("idle-by-grpc")]) as client:
        await client.call("ModelInfer", asking() | {"model_name": "by-grpc"})
        (stats,) = (await client.call("ModelStatistics", {"name": "by-grpc"})).model_stats
        assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("by-grpc", "1", 1, 1)
        assert (stats.inference_stats.queue.count, stats.inference_stats.success.count) == (1, 1)
        assert stats.inference_stats.success.ns > 0
        assert len((await client.call("ModelStatistics")).model_stats) == 2


async def test_a_call_that_is_given_up_is_withdrawn() -> None:
    async with serving() as client:
        client.device.gate.clear()
        first = client.call("ModelInfer", asking())
        await until(lambda: len(client.device.batches) == 1)
        second = client.call("ModelInfer", asking())
        await until(lambda: client.in_flight == 2)
        second.cancel()
        await until(lambda: client.in_flight == 1)
        client.device.gate.set()
        await first
        assert len(client.device.batches) == 1


async def test_the_deadline_of_a_call_is_kept() -> None:
    async with serving() as client:
        client.device.gate.clear()
        await client.refused(grpc.StatusCode.DEADLINE_EXCEEDED, "ModelInfer", asking(), timeout=0.2)
        await until(lambda: client.in_flight == 0)
        error = await client.refused(grpc.StatusCode.DEADLINE_EXCEEDED, "ModelInfer", asking(deadline_ms=20))
        assert "0.02 s" in error.details()
        late = asking(timeout=20_000)
        error = await client.refused(grpc.StatusCode.DEADLINE_EXCEEDED, "ModelInfer", late, timeout=50)
        assert "0.02 s" in error.details()
        client.device.gate.set()
        await client.call("ModelInfer", asking(), timeout=3600)  # longer than the server allows by itself


async def test_a_message_that_never_comes_is_not_waited_for() -> None:
    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def none() -> AsyncIterator[bytes]:
        for each in list[bytes]():
            yield each

    async with serving(deadline_s=0.2) as client:
        for rpc in ("ServerLive", "ModelInfer"):
            method = client.channel.stream_unary(f"/{SERVICE}/{rpc}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(nothing())
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(none())
            assert (caught.value.code(), caught.value.details()) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "the call has no message",
            )


@pytest.mark.parametrize("compression", list(grpc.Compression))
async def test_a_message_that_is_too_large_is_refused_however_it_comes(compression: grpc.Compression) -> None:
    async with serving(max_body_bytes=100_000) as client:
        await client.call("ModelInfer", asking(), compression=compression)
        large = asking(raw=bytes(200_000))
        error = await client.refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "ModelInfer", large, compression=compression)
        assert "larger than max" in error.details()


async def test_calls_hold_only_so_much_together() -> None:
    async with serving(max_body_bytes=1000) as client:
        client.server.hold(8000)
        error = await client.refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "ModelInfer", asking())
        assert "at most 8000" in error.details()
        client.server.hold(-8000)
        await client.call("ModelInfer", asking())


async def test_a_method_that_there_is_not_is_unimplemented() -> None:
    async with serving() as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.channel.unary_unary(f"/{SERVICE}/TraceSetting")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_who_is_about_to_end_says_so_and_answers_what_it_has() -> None:
    async with serving() as client:
        client.device.gate.clear()
        call = client.call("ModelInfer", asking())
        await until(lambda: client.in_flight == 1)
        client.app.state.is_draining = True
        assert not (await client.call("ServerReady")).ready and (await client.call("ServerLive")).live
        assert not (await client.call("ModelReady", {"name": "tiny"})).ready
        client.server.begin_to_end(30)
        client.device.gate.set()
        assert (await call).model_name == "tiny"
        await client.server.ended()
        await client.refused(grpc.StatusCode.UNAVAILABLE, "ServerLive")


async def test_garbage_is_refused() -> None:
    whole = message_class("ModelInferRequest")(**asking(outputs=[("logits", {"classification": 2})], r=2))
    encoded = whole.SerializeToString()
    async with serving() as client:
        loop = asyncio.get_running_loop()

        def send(message: bytes) -> None:
            async def call() -> None:
                try:
                    await client.call("ModelInfer", message)
                except grpc.aio.AioRpcError as error:
                    refusals = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
                    assert error.code() in refusals, error

            asyncio.run_coroutine_threadsafe(call(), loop).result()

        @settings(max_examples=100)
        @given(st.binary(max_size=60))
        def anything(message: bytes) -> None:
            send(message)

        @settings(max_examples=300)
        @given(st.integers(0, len(encoded) - 1), st.binary(max_size=3))
        def nearly(place: int, other: bytes) -> None:
            send(encoded[:place] + other + encoded[place + len(other) :])

        await asyncio.to_thread(anything)
        await asyncio.to_thread(nearly)
