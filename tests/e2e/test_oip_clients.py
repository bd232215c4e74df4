"""The clients that people have for the Open Inference Protocol, against a real server: Triton's and KServe's."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http
import tritonclient.http.aio as by_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from server.model_spec import BUNDLED_NAME
from tests.e2e.service import Service, StartService

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the clients
]

SIDE, CLASSES, FEATURES = 64, 200, 192
MEAN = STD = 0.5


def grpc_address(service: Service) -> str:
    found = re.search(r"gRPC \(Open Inference Protocol v2\) on (\S+)", "".join(service.log))
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two HTTP processes, with gRPC."""
    service = Service("--http-workers", "2", "--grpc-port", "0", state_dir=tmp_path_factory.mktemp("state"))
    service.wait_until_ready()
    yield service
    assert service.stop() == 0


@pytest.fixture(params=[by_http, by_grpc], ids=["http", "grpc"])
def module(request: pytest.FixtureRequest) -> Any:
    """Triton's client of one protocol; both have the same names."""
    return request.param


def client_of(module: Any, service: Service) -> Any:
    url = service.url.removeprefix("http://") if module is by_http else grpc_address(service)
    return module.InferenceServerClient(url)


@pytest.fixture
def client(module: Any, service: Service) -> Iterator[Any]:
    client = client_of(module, service)
    yield client
    client.close()


@pytest.fixture
def pixels() -> np.ndarray[Any, Any]:
    """A picture of the model's size."""
    return np.asarray(Image.linear_gradient("L").convert("RGB").resize((SIDE, SIDE)))


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tensor(module: Any, values: np.ndarray[Any, Any], datatype: str, **options: Any) -> Any:
    made = module.InferInput("image", list(values.shape), datatype)
    made.set_data_from_numpy(values, **options)
    return made


def files(module: Any, *encoded: bytes, **options: Any) -> Any:
    return tensor(module, np.array(encoded, dtype=np.object_), "BYTES", **options)


def natively(service: Service, encoded: bytes, r: int) -> dict[str, Any]:
    """What our own endpoint says."""
    answer = httpx.post(f"{service.url}/classify", params={"r": r}, files={"image": encoded}, timeout=60).json()
    best: dict[str, Any] = answer["results"][0]["top_k"][0]
    return best


def test_it_tells_what_it_is(client: Any, module: Any) -> None:
    options: dict[str, Any] = {} if module is by_http else {"as_json": True}
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(BUNDLED_NAME) and client.is_model_ready(BUNDLED_NAME, "1")
    assert "binary_tensor_data" in client.get_server_metadata(**options)["extensions"]
    metadata = client.get_model_metadata(BUNDLED_NAME, **options)
    assert metadata["versions"] == ["1"] and metadata["inputs"][0]["name"] == "image"
    assert [each["name"] for each in metadata["outputs"]] == ["probabilities", "logits", "embedding"]
    config = client.get_model_config(BUNDLED_NAME, "1", **options)
    config = config.get("config", config)
    assert config["max_batch_size"] == 32 and config["input"][0]["data_type"] == "TYPE_STRING"
    index = client.get_model_repository_index(**options)
    assert (index["models"] if module is by_grpc else index)[0]["state"] == "READY"


@pytest.mark.parametrize("of_request", [True, False], ids=["parameter", "header"])
def test_it_answers_as_our_own_endpoint_does_with_the_r_asked_for(
    service: Service, client: Any, module: Any, photo: bytes, of_request: bool
) -> None:
    how: dict[str, Any] = {"parameters": {"r": 8}} if of_request else {"headers": {"x-r": "8"}}
    answer = client.infer(BUNDLED_NAME, [files(module, photo)], request_id="42", **how)
    probabilities = answer.as_numpy("probabilities")
    assert probabilities.shape == (1, CLASSES) and probabilities.sum() == pytest.approx(1, abs=1e-4)
    best = natively(service, photo, 8)
    assert probabilities.argmax() == best["index"] and probabilities.max() == pytest.approx(best["score"], abs=1e-5)
    response = answer.get_response() if module is by_http else answer.get_response(as_json=True)
    assert response["id"] == "42"
    parameters = response["parameters"]
    assert (parameters["r"], parameters["tokens"]) in ((8, 161), ({"int64_param": "8"}, {"int64_param": "161"}))


def test_pixels_of_the_models_size_give_the_answer_of_their_file(
    client: Any, module: Any, pixels: np.ndarray[Any, Any]
) -> None:
    normalised = ((pixels / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)[None]
    twice = np.stack([pixels, pixels])
    given = [
        files(module, png(pixels)),
        files(module, png(pixels), png(pixels)),
        tensor(module, np.array([[png(pixels)]], dtype=np.object_), "BYTES"),
        tensor(module, twice, "UINT8"),
        tensor(module, np.ascontiguousarray(normalised), "FP32"),
    ]
    if module is by_http:
        given += [
            tensor(module, pixels[None], "UINT8", binary_data=False),
            tensor(module, np.ascontiguousarray(normalised), "FP32", binary_data=False),
        ]
    first, *others = (
        client.infer(BUNDLED_NAME, [each], outputs=[module.InferRequestedOutput("logits")]).as_numpy("logits")
        for each in given
    )
    for other in others:
        for row in other:
            np.testing.assert_allclose(row, first[0], atol=1e-3)


def test_several_outputs_and_the_likeliest_classes(client: Any, module: Any, photo: bytes) -> None:
    wanted = [
        module.InferRequestedOutput("probabilities", class_count=3),
        module.InferRequestedOutput("logits"),
        module.InferRequestedOutput("embedding"),
    ]
    answer = client.infer(BUNDLED_NAME, [files(module, photo, photo)], model_version="1", outputs=wanted)
    classes, logits = answer.as_numpy("probabilities"), answer.as_numpy("logits")
    assert classes.shape == (2, 3) and logits.shape == (2, CLASSES)
    assert answer.as_numpy("embedding").shape == (2, FEATURES)
    score, index, label = classes[0, 0].decode().split(":", 2)
    assert int(index) == logits[0].argmax() and 0 < float(score) < 1 and label


def test_outputs_as_json(service: Service, photo: bytes) -> None:
    client = client_of(by_http, service)
    wanted = [
        by_http.InferRequestedOutput("embedding", binary_data=False),
        by_http.InferRequestedOutput("logits", binary_data=False, class_count=2),
    ]
    answer = client.infer(BUNDLED_NAME, [files(by_http, photo)], outputs=wanted)
    assert answer.as_numpy("embedding").shape == (1, FEATURES) and answer.as_numpy("logits").shape == (1, 2)
    client.close()


@pytest.mark.parametrize("request_by", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_by", [None, "gzip", "deflate"])
def test_bodies_are_compressed_both_ways(
    service: Service, photo: bytes, request_by: str | None, response_by: str | None
) -> None:
    client = client_of(by_http, service)
    answer = client.infer(
        BUNDLED_NAME,
        [files(by_http, *4 * [photo])],
        request_compression_algorithm=request_by,
        response_compression_algorithm=response_by,
    )
    assert answer.as_numpy("probabilities").shape == (4, CLASSES)
    client.close()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_messages_are_compressed(service: Service, photo: bytes, algorithm: str) -> None:
    client = client_of(by_grpc, service)
    answer = client.infer(BUNDLED_NAME, [files(by_grpc, photo)], compression_algorithm=algorithm)
    assert answer.as_numpy("probabilities").shape == (1, CLASSES)
    client.close()


async def test_the_client_of_asyncio(service: Service, photo: bytes) -> None:
    async with by_aio.InferenceServerClient(service.url.removeprefix("http://")) as client:
        assert await client.is_server_ready() and await client.is_model_ready(BUNDLED_NAME)
        assert (await client.get_model_metadata(BUNDLED_NAME))["name"] == BUNDLED_NAME
        assert (await client.get_inference_statistics(BUNDLED_NAME))["model_stats"][0]["name"] == BUNDLED_NAME
        for options in ({}, {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}):
            answer = await client.infer(BUNDLED_NAME, [files(by_http, photo)], headers={"x-r": "8"}, **options)
            assert answer.as_numpy("probabilities").shape == (1, CLASSES)
        with pytest.raises(InferenceServerException, match="each r must lie between 0 and 128"):
            await client.infer(BUNDLED_NAME, [files(by_http, photo)], headers={"x-r": "1000"})


@pytest.mark.parametrize(
    ("ask", "http", "grpc", "message"),
    [
        ({"model_name": "none"}, "404", "NOT_FOUND", "there is no model 'none'; there are: "),
        ({"model_version": "7"}, "404", "NOT_FOUND", "has no version '7'; it has '1'"),
        ({"parameters": {"q": 1}}, "422", "INVALID_ARGUMENT", "there is no parameter 'q'; there are: r, "),
        ({"parameters": {"r": 1000}}, "422", "INVALID_ARGUMENT", "r is 1000; each r must lie between 0 and 128"),
        ({"timeout": 5_000_000_000}, "422", "INVALID_ARGUMENT", "deadline_ms is 5000000.0; it must lie between"),
        ({"sequence_id": 7}, "422", "INVALID_ARGUMENT", "there is no parameter 'sequence"),
    ],
)
def test_the_clients_exception_says_what_is_wrong(
    client: Any, module: Any, photo: bytes, ask: dict[str, Any], http: str, grpc: str, message: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(**({"model_name": BUNDLED_NAME, "inputs": [files(module, photo)]} | ask))
    assert message in caught.value.message()
    assert caught.value.status() == (http if module is by_http else f"StatusCode.{grpc}")


def test_what_is_no_image_is_said_to_be_none(client: Any, module: Any) -> None:
    with pytest.raises(InferenceServerException, match="image"):
        client.infer(BUNDLED_NAME, [files(module, b"no image, but some text of this length")])


def test_statistics_grow(service: Service, client: Any, module: Any, photo: bytes) -> None:
    options: dict[str, Any] = {} if module is by_http else {"as_json": True}

    def count() -> tuple[int, int]:
        (stats,) = client.get_inference_statistics(BUNDLED_NAME, "1", **options)["model_stats"]
        return int(stats["inference_count"]), int(stats["inference_stats"]["queue"]["count"])

    client.infer(BUNDLED_NAME, [files(module, photo)])
    before = count()
    client.infer(BUNDLED_NAME, [files(module, photo, photo)])
    assert count() == (before[0] + 2, before[1] + 2)


def test_the_deadline_of_a_call(service: Service, photo: bytes) -> None:
    client = client_of(by_grpc, service)
    with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        client.infer(BUNDLED_NAME, [files(by_grpc, photo)], client_timeout=0.0005)
    answer = client.infer(BUNDLED_NAME, [files(by_grpc, photo)], client_timeout=3600)
    assert answer.as_numpy("probabilities").shape == (1, CLASSES)
    client.close()


def test_kserves_client(service: Service, photo: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo)
    script = Path(__file__).with_name("kserve_client.py")  # whose import here would clash with Triton's messages
    command = [sys.executable, "-W", "ignore", str(script), BUNDLED_NAME, service.url, grpc_address(service), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    best = natively(service, photo, 8)
    rest, grpc = found["rest"], found["grpc"]
    assert (rest["live"], rest["ready"], rest["model"], rest["other"]) == (True, True, True, False)
    assert rest["binary"] == rest["json"] == [["probabilities", 1, CLASSES]]
    assert rest["top"] == [["probabilities", 1, 3], ["embedding", 1, FEATURES]]
    assert rest["top best"][0].split(":")[1] == str(best["index"])
    assert rest["binary r"] == rest["json r"] == rest["top r"] == 8
    assert "there is no parameter 'q'; there are: r, " in rest["error"]
    assert (grpc["live"], grpc["ready"], grpc["model"]) == (True, True, True)
    assert grpc["raw"] == grpc["contents"] == [["probabilities", 1, CLASSES]]
    assert grpc["raw best"] == grpc["contents best"] == best["index"]
    assert "8" in grpc["raw r"] and "8" in grpc["contents r"] and "8" in grpc["header r"]
    assert "each r must lie between 0 and 128" in grpc["error"]


def test_keys_and_the_end(start_service: StartService, photo: bytes) -> None:
    service = start_service("--grpc-port", "0", "--api-key", "sesame")
    for module in (by_http, by_grpc):
        client = client_of(module, service)
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(BUNDLED_NAME)
        with pytest.raises(InferenceServerException, match="send the API key"):
            client.infer(BUNDLED_NAME, [files(module, photo)])
        for headers in ({"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}):
            client.infer(BUNDLED_NAME, [files(module, photo)], headers=headers)
        client.close()
    client = client_of(by_grpc, service)
    assert client.is_server_live()
    port = grpc_address(service).rpartition(":")[2]
    assert service.stop() == 0
    with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
        client.is_server_live()
    client.close()
    again = start_service("--grpc-port", port)  # the port is free, whatever connections linger
    assert grpc_address(again).endswith(f":{port}")
