"""The Open Inference Protocol over REST, with a fake device: each endpoint, each form of input, what is refused."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.protocols.oip_infer import PARAMETERS
from server.ipc.messages import Classify, Embed, Score
from tests.server.conftest import NUM_CLASSES, SIDE, Service, grey_png, model_info, serving
from tests.server.oip import INFER, C, activated, asking, features_of, logits_of, oip_serving

PNG = grey_png(100)
PACKED = struct.pack("<I", len(PNG)) + PNG
PIXELS = bytes([100]) * (SIDE * SIDE * 3)
PLAIN = (0, 0, 0)


def assert_refused(response: httpx.Response, status: int, part: str = "") -> None:
    """The error is a string, and the content type exactly what clients look for."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"} and isinstance(body["error"], str) and part in body["error"], body


async def infer(service: Service, said: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = await service.client.post(INFER, json=said, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    return answer


def with_binary(said: dict[str, Any], blocks: bytes) -> tuple[bytes, dict[str, str]]:
    head = json.dumps(said).encode()
    return head + blocks, {"inference-header-content-length": str(len(head))}


async def test_the_server_and_its_models_tell_what_they_are() -> None:
    async with oip_serving(models=[model_info(num_features=C), model_info("other", labels=(), num_features=7)]) as it:

        async def get(path: str) -> Any:
            response = await it.client.get(path)
            assert response.status_code == 200, response.text
            return response.json()

        assert (await get("/v2"))["extensions"][:2] == ["classification", "model_configuration"]
        assert await get("/v2/health/live") == {"live": True}
        assert await get("/v2/health/ready") == {"ready": True}
        for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
            assert await get(path) == {
                "name": "tiny",
                "versions": ["1"],
                "platform": "timm",
                "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}],
                "outputs": [
                    {"name": "probabilities", "datatype": "FP32", "shape": [-1, NUM_CLASSES]},
                    {"name": "logits", "datatype": "FP32", "shape": [-1, NUM_CLASSES]},
                    {"name": "embedding", "datatype": "FP32", "shape": [-1, C]},
                ],
            }
            assert await get(f"{path}/ready") == {"name": "tiny", "ready": True}
            config = await get(f"{path}/config")
            assert config["max_batch_size"] == 32
            assert config["parameters"]["mean"] == {"string_value": "0.5,0.5,0.5"}
            assert config["parameters"]["input_size"] == {"string_value": "8,8"}
            assert config["input"] == [{"name": "image", "data_type": "TYPE_STRING", "dims": [1]}]
            assert config["output"][2] == {"name": "embedding", "data_type": "TYPE_FP32", "dims": [C]}
        assert [each["name"] for each in (await get("/v2/models/other"))["outputs"]] == ["embedding"]
        index = (await it.client.post("/v2/repository/index")).json()
        assert [(each["name"], each["version"], each["state"]) for each in index] == [
            ("tiny", "1", "READY"),
            ("other", "1", "READY"),
        ]


async def test_what_is_not_there_is_not_found_in_the_shape_of_the_protocol() -> None:
    async with oip_serving() as service:
        for path in ("/v2/models/none", "/v2/models/none/ready", "/v2/models/tiny/versions/2", "/v2/models/none/stats"):
            assert_refused(await service.client.get(path), 404)
        for path in ("/v2/models/none/infer", "/v2/models/tiny/versions/01/infer"):
            assert_refused(await service.client.post(path, json=asking()), 404)
        assert_refused(await service.client.get("/v2/nothing"), 404)
        assert_refused(await service.client.get(INFER), 405)


async def test_a_server_that_is_about_to_end_is_not_ready_and_alive() -> None:
    async with oip_serving() as service:
        service.app.state.is_draining = True
        ready = await service.client.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False) and ready.headers["retry-after"]
        assert_refused(await service.client.get("/v2/models/tiny/ready"), 503, "shutting down")
        assert (await service.client.get("/v2/health/live")).json() == {"live": True}


async def test_an_answer_has_probabilities_and_says_how_they_were_computed() -> None:
    async with oip_serving() as service:
        said = asking(100, 7) | {"id": "42"}
        response = await service.client.post(INFER, json=said, headers={"x-r": "4"})
        answer = response.json()
        (output,) = answer.pop("outputs")
        assert (output["name"], output["datatype"], output["shape"]) == ("probabilities", "FP32", [2, NUM_CLASSES])
        expected = [
            value
            for grey in (100, 7)
            for value in activated(logits_of(bytes([grey]) * (SIDE * SIDE * 3), (4, 4, 4)), "softmax")
        ]
        assert output["data"] == pytest.approx(expected, rel=1e-5)
        parameters = {
            "r": 4, "r_source": "request", "tuned": False, "tokens": 5, "batch_size": 2, "config_version": 1,
        }  # fmt: skip
        assert answer == {"model_name": "tiny", "model_version": "1", "id": "42", "parameters": parameters}
        assert (response.headers["x-r"], response.headers["x-batch-size"]) == ("4", "2")


@pytest.mark.parametrize("name", ["probabilities", "logits", "embedding"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
async def test_each_output_holds_its_numbers(name: str, activation: str) -> None:
    expected = {
        "probabilities": activated(logits_of(PIXELS, PLAIN), activation),
        "logits": logits_of(PIXELS, PLAIN),
        "embedding": features_of(PIXELS, PLAIN),
    }
    async with oip_serving() as service:
        answer = await infer(service, asking(outputs=[{"name": name}], function_to_apply=activation))
        assert [each["name"] for each in answer["outputs"]] == [name]
        assert answer["outputs"][0]["data"] == pytest.approx(expected[name], rel=1e-5)
        together = await infer(
            service, asking(outputs=[{"name": each} for each in expected], function_to_apply=activation)
        )
        assert [each["name"] for each in together["outputs"]] == list(expected)
        for each in together["outputs"]:
            assert each["data"] == pytest.approx(expected[each["name"]], rel=1e-4, abs=1e-7)


async def test_all_outputs_take_one_request_of_the_engine() -> None:
    top, numbers = {"name": "probabilities", "parameters": {"classification": 2}}, {"name": "logits"}
    async with oip_serving() as service:
        for outputs, kind in (
            ([top], Classify),
            ([numbers], Score),
            ([{"name": "embedding"}], Embed),
            ([top, numbers, {"name": "embedding"}], Score),
        ):
            service.device.batches.clear()
            await infer(service, asking(outputs=outputs))
            ((_, (item,)),) = service.device.batches
            assert type(item.request) is kind


@pytest.mark.parametrize("others", [[], [{"name": "embedding"}]])
async def test_classification_names_the_likeliest_classes(others: list[dict[str, Any]]) -> None:
    async with oip_serving() as service:
        outputs = [{"name": "logits", "parameters": {"classification": 3}}, *others]
        output = (await infer(service, asking(100, 7, outputs=outputs)))["outputs"][0]
        assert (output["datatype"], output["shape"]) == ("BYTES", [2, 3])
        first = logits_of(PIXELS, PLAIN).index(0)
        for rank, text in enumerate(output["data"][:3]):
            score, index, label = text.split(":")
            assert (float(score), int(index)) == (-0.5 * rank, (first + rank) % NUM_CLASSES)
            assert label == f"label {index}"


async def test_a_model_of_labels_gives_each_its_own_probability_where_nobody_asks_otherwise() -> None:
    async with oip_serving(models=[model_info(num_features=C, activation="sigmoid")]) as service:
        (output,) = (await infer(service, asking()))["outputs"]
        assert output["data"] == pytest.approx(activated(logits_of(PIXELS, PLAIN), "sigmoid"), rel=1e-5)


async def test_a_model_without_a_classifier_gives_its_embedding() -> None:
    async with oip_serving(models=[model_info(labels=(), num_features=C)]) as service:
        (output,) = (await infer(service, asking()))["outputs"]
        assert (output["name"], output["shape"], output["data"]) == ("embedding", [1, C], features_of(PIXELS, PLAIN))
        response = await service.client.post(INFER, json=asking(outputs=[{"name": "logits"}]))
        assert_refused(response, 422, "tiny has no classifier")


def inputs() -> dict[str, tuple[dict[str, Any], bytes | None]]:
    """The same image in all forms: an input, and its binary data."""
    half = np.frombuffer(PIXELS, np.uint8).reshape(1, SIDE, SIDE, 3).transpose(0, 3, 1, 2) / 255
    values = np.ascontiguousarray((half - 0.5) / 0.5, "<f4")
    text = base64.b64encode(PNG).decode()
    rgb, normalised = [1, SIDE, SIDE, 3], [1, 3, SIDE, SIDE]
    return {
        "file": ({"datatype": "BYTES", "shape": [1]}, PACKED),
        "file with a second axis": ({"datatype": "BYTES", "shape": [1, 1]}, PACKED),
        "base64": ({"datatype": "BYTES", "shape": [1], "data": [text]}, None),
        "pixels": ({"datatype": "UINT8", "shape": rgb}, PIXELS),
        "pixels as JSON": ({"datatype": "UINT8", "shape": rgb, "data": list(PIXELS)}, None),
        "normalised": ({"datatype": "FP32", "shape": normalised}, values.tobytes()),
        "normalised as JSON": ({"datatype": "FP32", "shape": normalised, "data": values.tolist()}, None),
    }


@pytest.mark.parametrize("form", inputs())
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
async def test_every_form_of_input_gives_the_same_answer(form: str, encoding: str | None) -> None:
    said, binary = inputs()[form]
    said = {"name": "image", **said}
    if binary is not None:
        said["parameters"] = {"binary_data_size": len(binary)}
    content, headers = with_binary({"inputs": [said], "parameters": {"r": 2}}, binary or b"")
    if encoding is not None:
        content = gzip.compress(content) if encoding == "gzip" else zlib.compress(content)
        headers["content-encoding"] = encoding
    async with oip_serving() as service:
        response = await service.client.post(INFER, content=content, headers=headers)  # and no content type
        assert response.status_code == 200, response.text
        (output,) = response.json()["outputs"]
        assert output["data"] == pytest.approx(activated(logits_of(PIXELS, (2, 2, 2)), "softmax"), rel=1e-5)


@pytest.mark.parametrize("body", [PNG, PACKED])
async def test_a_body_that_is_the_image_and_nothing_else(body: bytes) -> None:
    async with oip_serving() as service:
        headers = {"inference-header-content-length": "0", "x-r": "2"}
        response = await service.client.post(INFER, content=body, headers=headers)
        assert response.headers["content-type"] == "application/octet-stream"
        length = int(response.headers["inference-header-content-length"])
        (output,) = json.loads(response.content[:length])["outputs"]
        assert output["parameters"] == {"binary_data_size": 4 * NUM_CLASSES} and "data" not in output
        values = np.frombuffer(response.content[length:], "<f4").tolist()
        assert values == pytest.approx(activated(logits_of(PIXELS, (2, 2, 2)), "softmax"), rel=1e-5)


@pytest.mark.parametrize("by_default", [None, False, True])
@pytest.mark.parametrize("of_it", [None, False, True])
async def test_outputs_are_binary_where_that_is_asked(by_default: bool | None, of_it: bool | None) -> None:
    outputs = [{"name": "embedding"} | ({} if of_it is None else {"parameters": {"binary_data": of_it}})]
    parameters = {} if by_default is None else {"binary_data_output": by_default}
    async with oip_serving() as service:
        response = await service.client.post(INFER, json=asking(outputs=outputs, **parameters))
        is_binary = bool(by_default if of_it is None else of_it)
        assert ("inference-header-content-length" in response.headers) == is_binary
        if is_binary:
            length = int(response.headers["inference-header-content-length"])
            assert np.frombuffer(response.content[length:], "<f4").tolist() == features_of(PIXELS, PLAIN)
        else:
            assert response.json()["outputs"][0]["data"] == features_of(PIXELS, PLAIN)


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br, gzip;q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("br", None),
        ("", None),
    ],
)
async def test_answers_are_compressed_where_that_is_accepted(accept: str, encoding: str | None) -> None:
    async with oip_serving() as service:
        plain = await infer(service, asking(), **{"accept-encoding": ""})
        async with service.client.stream("POST", INFER, json=asking(), headers={"accept-encoding": accept}) as response:
            raw = b"".join([piece async for piece in response.aiter_raw()])
        assert response.headers.get("content-encoding") == encoding
        window = {"gzip": 31, "deflate": 15}.get(encoding or "")
        assert json.loads(zlib.decompress(raw, window) if window else raw) == plain
        assert "content-encoding" not in (await service.client.get("/v2", headers={"accept-encoding": accept})).headers


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "zstd", ""])
async def test_other_encodings_are_refused(encoding: str) -> None:
    async with oip_serving() as service:
        headers = {"content-encoding": encoding}
        assert_refused(await service.client.post(INFER, content=b"x", headers=headers), 415, "Content-Encoding")


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", gzip.compress(b"{}")[:-9], gzip.compress(b"{}") + b"more"], ids=len
)
async def test_a_body_that_is_not_as_its_encoding_says_is_refused(content: bytes) -> None:
    async with oip_serving() as service:
        assert_refused(await service.client.post(INFER, content=content, headers={"content-encoding": "gzip"}), 400)


async def test_a_small_body_cannot_come_to_more_than_a_large_one_may() -> None:
    bomb = gzip.compress(bytes(4 << 20))
    async with oip_serving(max_body_bytes=100_000) as service:
        assert len(bomb) < 10_000
        response = await service.client.post(INFER, content=bomb, headers={"content-encoding": "gzip"})
        assert_refused(response, 413, "larger than 100000 bytes")
        fits = gzip.compress(json.dumps(asking()).encode().ljust(100_000))
        response = await service.client.post(INFER, content=fits, headers={"content-encoding": "gzip"})
        assert response.status_code == 200


async def test_the_dial_of_a_request() -> None:
    async with oip_serving() as service:
        for parameters, headers, r in (
            ({"r": 4}, {}, 4),
            ({"r": "4"}, {}, 4),
            ({"r": [4, 2, 1]}, {}, "4,2,1"),
            ({"r": "auto", "max_r": 4, "min_agreement": 0.5}, {}, 0),
            ({"r": 2, "inflect": -1}, {}, "4,2,0"),
            ({}, {"x-r": "3"}, 3),
        ):
            assert (await infer(service, asking(**parameters), **headers))["parameters"]["r"] == r
        response = await service.client.post(INFER, json=asking(r=4), headers={"x-r": "4"})
        assert_refused(response, 422, "give it once")


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"q": 1}, "there is no parameter 'q'; there are: r, max_r"),
        ({"r": 99}, "between 0 and 8"),
        ({"r": {}}, "r is {}"),
        ({"top_k": 3}, "no parameter 'top_k'"),
        ({"timeout": -1}, "timeout is -1"),
        ({"timeout": True}, "timeout is True"),
        ({"timeout": 1, "deadline_ms": 5}, "give one"),
        ({"timeout": 10**40}, "deadline_ms is"),
        ({"deadline_ms": 10**9}, "deadline_ms is"),
        ({"binary_data_output": 1}, "true or false"),
        ({"function_to_apply": "tanh"}, "function_to_apply"),
        ({"sequence_id": 1}, "no parameter 'sequence_id'"),
    ],
)
async def test_parameters_out_of_range_are_refused(parameters: dict[str, Any], part: str) -> None:
    async with oip_serving() as service:
        assert_refused(await service.client.post(INFER, json=asking(**parameters)), 422, part)


async def test_parameters_that_change_nothing_and_fields_of_others_are_passed_over() -> None:
    async with oip_serving() as service:
        said = asking(priority=3, timeout=0, triton_enable_empty_final_response=False)
        said |= {"id": "", "model_name": "tiny", "outputs": None}
        assert "id" not in await infer(service, said)


@pytest.mark.parametrize(
    ("outputs", "part"),
    [
        ([{"name": "scores"}], "there are: probabilities, logits, embedding"),
        ([{"name": "logits"}, {"name": "logits"}], "twice"),
        ([{"name": "embedding", "parameters": {"classification": 1}}], "not with embedding"),
        ([{"name": "logits", "parameters": {"classification": 0}}], "from 1"),
        ([{"name": "logits", "parameters": {"classification": NUM_CLASSES + 1}}], f"between 1 and {NUM_CLASSES}"),
        ([{"name": "logits", "parameters": {"classification": "2"}}], "from 1"),
        ([{"name": "logits", "parameters": {"binary_data": "yes"}}], "true or false"),
    ],
)
async def test_outputs_that_there_are_not_are_refused(outputs: list[dict[str, Any]], part: str) -> None:
    async with oip_serving() as service:
        assert_refused(await service.client.post(INFER, json=asking(outputs=outputs)), 422, part)


@pytest.mark.parametrize(
    ("content", "length", "status"),
    [
        (b"", None, 400),
        (b"{}", None, 400),
        (b"[]", None, 400),
        (b'{"inputs": []}', None, 422),
        (b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}]}', None, 400),
        (b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": ["1"], "data": []}]}', None, 400),
        (b'{"inputs": [{"name": 3, "datatype": "BYTES", "shape": [1], "data": []}]}', None, 400),
        (b'{"inputs": [], "id": 1}', None, 400),
        (b'{"inputs": [' + b"[" * 100_000, None, 400),
        (b'{"inputs": [], "id": "\xff"}', None, 400),
        (b'{"inputs": [], "id": "' + b"a" * 70_000 + b'"}', None, 422),
        (b'{"inputs": []}' + b"xx", "14", 400),
        (b"{}", "3", 400),
        (b"{}", "-1", 400),
        (b"{}", "1e3", 400),
        (b"{}", "", 400),
        (b"", "0", 400),
    ],
)
async def test_bodies_that_are_no_request_are_refused(content: bytes, length: str | None, status: int) -> None:
    headers = {} if length is None else {"inference-header-content-length": length}
    async with oip_serving() as service:
        assert_refused(await service.client.post(INFER, content=content, headers=headers), status)


@pytest.mark.parametrize("size", [-1, len(PACKED) + 1, 10**30, True, "9", 1.0])
async def test_a_size_that_the_body_does_not_have_is_refused(size: Any) -> None:
    said = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    content, headers = with_binary({"inputs": [said]}, PACKED)
    async with oip_serving() as service:
        assert_refused(await service.client.post(INFER, content=content, headers=headers), 400, "binary_data_size")


async def test_json_may_hold_the_values_of_the_images_that_a_request_may_have_and_not_many_more() -> None:
    async with oip_serving(max_images=2) as service:

        def pixels(n: int) -> dict[str, Any]:
            return {
                "inputs": [{"name": "image", "datatype": "UINT8", "shape": [n, SIDE, SIDE, 3], "data": n * [*PIXELS]}]
            }

        assert len(json.dumps(pixels(2)["inputs"][0]["data"]).split(",")) == 2 * SIDE * SIDE * 3
        await infer(service, pixels(2))
        assert_refused(await service.client.post(INFER, json=pixels(3)), 413, "at most 2")
        assert_refused(await service.client.post(INFER, json=pixels(40)), 413, "values")


async def test_a_broken_image_is_refused_and_said_which() -> None:
    async with oip_serving() as service:
        said = asking(1, 2)
        said["inputs"][0]["data"][1] = base64.b64encode(b"no image at all, but long enough").decode()
        assert_refused(await service.client.post(INFER, json=said), 415)


async def test_a_full_server_says_when_to_come_back() -> None:
    async with oip_serving(max_queue_size=1) as service:
        with service.app.state.service.admission.permit(1, 1.0):
            response = await service.client.post(INFER, json=asking())
        assert_refused(response, 429)
        assert int(response.headers["retry-after"]) >= 1


async def test_statistics_grow_with_what_is_asked_by_any_protocol() -> None:
    model = model_info("counted", num_features=C)
    async with oip_serving(models=[model, model_info("idle")]) as service:

        async def stats(path: str) -> dict[str, Any]:
            found = (await service.client.get(path)).json()["model_stats"]
            return {each["name"]: each for each in found}

        before = (await stats("/v2/models/counted/stats"))["counted"]
        path = "/v2/models/counted/infer"
        assert (await service.client.post(path, json=asking(1, 2))).status_code == 200
        assert (await service.client.post("/classify?model=counted", files={"image": PNG})).status_code == 200
        assert (await service.client.post(path, json=asking(r=99))).status_code == 422
        after = await stats("/v2/models/stats")
        assert after.keys() == {"counted", "idle"} and after["idle"]["inference_stats"]["queue"] == {
            "count": 0,
            "ns": 0,
        }
        counted = after["counted"]
        assert counted["inference_count"] - before["inference_count"] == 3
        assert counted["execution_count"] - before["execution_count"] == 2
        grown = {
            name: counted["inference_stats"][name]["count"] - before["inference_stats"][name]["count"]
            for name in counted["inference_stats"]
        }
        assert (grown["success"], grown["queue"], grown["compute_infer"], grown["cache_hit"]) == (2, 3, 2, 0)
        assert counted["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]


async def test_keys_are_needed_but_for_health() -> None:
    async with oip_serving(api_key="user-key", admin_key="admin-key") as service:
        free = (
            "/v2",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/tiny/ready",
            "/v2/models/tiny/versions/1/ready",
        )
        for path in free:
            assert (await service.client.get(path)).status_code == 200
        for method, path in (
            ("GET", "/v2/models/tiny"),
            ("GET", "/v2/models/tiny/config"),
            ("GET", "/v2/models/tiny/stats"),
            ("GET", "/v2/models/stats"),
            ("POST", "/v2/repository/index"),
            ("POST", INFER),
        ):
            said = asking() if path == INFER else None
            assert_refused(await service.client.request(method, path, json=said), 401, "API key")
            for key in ("user-key", "admin-key"):
                headers = {"authorization": f"Bearer {key}"}
                assert (await service.client.request(method, path, json=said, headers=headers)).status_code == 200


async def test_the_face_can_be_left_out() -> None:
    async with serving(protocol="none") as service:
        response = await service.client.get("/v2")
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"


LATIN = st.characters(min_codepoint=32, max_codepoint=255)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | st.text(max_size=9)
ANY: Any = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)
PLACES = [
    ("inputs",), ("inputs", 0), ("inputs", 0, "name"), ("inputs", 0, "datatype"), ("inputs", 0, "shape"),
    ("inputs", 0, "shape", 0), ("inputs", 0, "data"), ("inputs", 0, "data", 0), ("inputs", 0, "parameters"), ("id",),
    ("outputs",), ("outputs", 0), ("outputs", 0, "name"), ("outputs", 0, "parameters"), ("parameters",),
    ("outputs", 0, "parameters", "classification"), ("outputs", 0, "parameters", "binary_data"),
    *(("parameters", name) for name in (*PARAMETERS, "other")),
]  # fmt: skip


async def test_garbage_is_answered_or_refused() -> None:
    async with oip_serving() as service:
        loop = asyncio.get_running_loop()

        def post(**said: Any) -> None:
            response = asyncio.run_coroutine_threadsafe(service.client.post(INFER, **said), loop).result()
            assert response.status_code < 500 or response.status_code == 504, response.text  # a short deadline
            if response.status_code != 200:
                assert_refused(response, response.status_code)

        @settings(max_examples=400)
        @given(st.sampled_from(PLACES), ANY)
        def in_a_field(place: tuple[Any, ...], garbage: Any) -> None:
            said: Any = asking(outputs=[{"name": "logits", "parameters": {"classification": 1}}], r=2) | {"id": "a"}
            inner = said
            for step in place[:-1]:
                inner = inner[step]
            inner[place[-1]] = garbage
            post(json=said)

        @given(st.binary(max_size=200), st.none() | st.integers(0, 250).map(str) | st.text(LATIN))
        def for_a_body(content: bytes, length: str | None) -> None:
            headers = {} if length is None else {b"inference-header-content-length": length.encode("latin-1")}
            post(content=content, headers=headers)

        await asyncio.to_thread(in_a_field)
        await asyncio.to_thread(for_a_body)


async def test_the_dial_turns_by_the_query() -> None:
    async with oip_serving() as service:
        for name, value, schedule in (("r", "2", "2"), ("r", "2,1", "2,1,0"), ("function_to_apply", "none", "0")):
            response = await service.client.post(INFER, params={name: value}, json=asking())
            assert (response.status_code, response.headers["x-r"]) == (200, schedule), response.text
        for params, said, part in (
            ({"r": "2"}, asking(r=2), "give it once"),
            ({"top_k": "2"}, asking(), "no parameter 'top_k' of the query"),
            ({"r": "99"}, asking(), "between 0 and 8"),
        ):
            assert_refused(await service.client.post(INFER, params=params, json=said), 422, part)
        both = await service.client.post(INFER, params={"r": "2"}, headers={"x-r": "2"}, json=asking())
        assert_refused(both, 422, "in the header x-r")
