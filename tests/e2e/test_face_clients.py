"""The clients that people have, against a real server: what each sends is answered in the way that it reads."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from operator import mul
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.client import Client
from tests.e2e.service import Service, StartService

pytestmark = pytest.mark.slow

PHOTO = Path(__file__).resolve().parents[2] / "server" / "static" / "samples" / "lighthouse.jpg"
MODEL = "tome-vit-tiny-64"
PROTOCOLS = "embeddings huggingface torchserve kserve sagemaker vertex"
_PROGRAM = (sys.executable, "-m", "server.cli")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service("--protocol", PROTOCOLS, state_dir=tmp_path_factory.mktemp("state"))
    service.wait_until_ready()
    yield service
    assert service.stop() == 0


@pytest.fixture(scope="module")
def expected(service: Service) -> dict[str, float]:
    """The likeliest classes of the photo at r=0, as our own client gets them."""
    with Client(service.url) as client:
        return {each.label: each.score for each in client.classify(PHOTO, r=0).top_k}


@pytest.fixture(scope="module")
def vector(service: Service) -> tuple[float, ...]:
    """The photo's vector at r=0, as our own client gets it."""
    with Client(service.url) as client:
        return client.embed(PHOTO, r=0).vector


def in_base64() -> str:
    return base64.b64encode(PHOTO.read_bytes()).decode()


def length(vector: Sequence[float]) -> float:
    return math.hypot(*vector)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    return float(sum(map(mul, one, other))) / (length(one) * length(other))


def test_our_own_client_gets_vectors_that_r_turns_a_little(service: Service, vector: tuple[float, ...]) -> None:
    with Client(service.url) as client:
        merged = client.embed(PHOTO, r=8)
        assert (merged.r, merged.r_source, len(merged.vector)) == (8, "request", 192)
        assert length(vector) == pytest.approx(1, abs=1e-5) and 0.5 < cosine(vector, merged.vector) < 0.99999
        raw = client.embed(PHOTO, r=0, normalize=False)
        assert length(raw.vector) > 1.5 and cosine(raw.vector, vector) == pytest.approx(1, abs=1e-6)


class TestOpenAI:
    @pytest.fixture
    def client(self, service: Service) -> Iterator[Any]:
        openai = pytest.importorskip("openai")
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            yield client

    def test_vectors_come_as_base64_by_default_and_as_numbers(self, client: Any, vector: tuple[float, ...]) -> None:
        photo = f"data:image/jpeg;base64,{in_base64()}"
        for said in ({}, {"encoding_format": "float"}):
            answer = client.embeddings.create(
                model=MODEL, input=[photo, in_base64()], extra_body={"r": 0, "modality": "image"}, **said
            )
            assert [each.index for each in answer.data] == [0, 1]
            for each in answer.data:
                assert each.embedding == pytest.approx(vector, abs=1e-5)
            assert (answer.model, answer.object, answer.usage.total_tokens) == (MODEL, "list", 2 * 257)
            assert answer.model_extra["r"] == 0

    def test_the_dial_turns_by_body_and_by_header(self, client: Any) -> None:
        by_body = client.embeddings.create(model=MODEL, input=in_base64(), extra_body={"r": 8})
        asked = client.embeddings.with_raw_response.create(
            model=MODEL, input=in_base64(), extra_headers={"x-r": "8"}, dimensions=64
        )
        assert asked.headers["x-r"] == "8"
        cut = asked.parse().data[0].embedding
        assert len(cut) == 64 and length(cut) == pytest.approx(1, abs=1e-5)
        assert cosine(cut, by_body.data[0].embedding[:64]) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize(
        ("said", "kind", "code", "words"),
        [
            ({"model": "huge"}, "NotFoundError", "not_found", "there are: "),
            ({"dimensions": 1000}, "UnprocessableEntityError", "invalid_parameter", "between 0 and 192"),
            ({"extra_body": {"r": 999}}, "UnprocessableEntityError", "invalid_parameter", "r is 999"),
            ({"input": "two words"}, "APIStatusError", "unsupported_format", "not an image"),
            ({"extra_body": {"modality": "text"}}, "UnprocessableEntityError", "invalid_parameter", "images only"),
        ],
    )
    def test_errors_are_read_as_its_own(
        self, client: Any, said: dict[str, Any], kind: str, code: str, words: str
    ) -> None:
        import openai

        with pytest.raises(getattr(openai, kind)) as raised:
            client.embeddings.create(**{"model": MODEL, "input": in_base64(), **said})
        error: Any = raised.value
        assert words in str(error) and words in error.body["message"]
        assert (error.code, error.type, error.param) == (code, "invalid_request_error", None)
        assert error.request_id == error.response.headers["x-request-id"]

    def test_the_models_are_listed(self, client: Any) -> None:
        assert [model.id for model in client.models.list()] == [MODEL]
        model = client.models.retrieve(MODEL)
        assert (model.id, model.object, model.owned_by) == (MODEL, "model", "tome-server")

    def test_a_wrong_key_is_said(self, start_service: StartService) -> None:
        openai = pytest.importorskip("openai")
        service = start_service(environment={"TOME_API_KEY": "secret"})
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="API key"):
                client.embeddings.create(model=MODEL, input=in_base64())
            right = client.with_options(api_key="secret")
            assert len(right.embeddings.create(model=MODEL, input=in_base64()).data[0].embedding) == 192


def test_infinitys_client_gets_vectors(service: Service, vector: tuple[float, ...]) -> None:
    infinity = pytest.importorskip("infinity_client")
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputImage
    from infinity_client.models.open_ai_embedding_input_image_modality import OpenAIEmbeddingInputImageModality

    body = OpenAIEmbeddingInputImage(
        input_=[f"data:image/jpeg;base64,{in_base64()}"], modality=OpenAIEmbeddingInputImageModality.IMAGE
    )
    with infinity.Client(base_url=f"{service.url}/v1", headers={"x-r": "0"}) as client:
        result: Any = embeddings.sync(client=client, body=body)
    assert result.data[0].embedding == pytest.approx(vector, abs=1e-5)
    assert result.usage.total_tokens == 257


class TestHuggingFace:
    @pytest.fixture
    def ask(self, service: Service) -> Any:
        hub = pytest.importorskip("huggingface_hub")
        return hub.InferenceClient(model=f"{service.url}/models/{MODEL}", headers={"x-r": "0"}).image_classification

    def test_bytes_and_paths_are_classified(self, ask: Any, expected: dict[str, float]) -> None:
        for image in (PHOTO.read_bytes(), str(PHOTO)):
            found = ask(image)
            assert {each.label: each.score for each in found} == pytest.approx(expected, abs=1e-5)
            assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)

    def test_parameters_are_minded(self, ask: Any, expected: dict[str, float]) -> None:
        two = ask(PHOTO.read_bytes(), top_k=2)
        assert [each.label for each in two] == list(expected)[:2]
        sigmoid = ask(PHOTO.read_bytes(), top_k=2, function_to_apply="sigmoid")
        logits = ask(PHOTO.read_bytes(), top_k=2, function_to_apply="none")
        for score, logit in zip(sigmoid, logits, strict=True):
            assert score.score == pytest.approx(1 / (1 + math.exp(-logit.score)), abs=1e-5)

    def test_the_default_model_stands_at_the_root(self, service: Service, expected: dict[str, float]) -> None:
        hub = pytest.importorskip("huggingface_hub")
        client = hub.InferenceClient(base_url=service.url, headers={"x-r": "0"})
        assert client.image_classification(PHOTO.read_bytes())[0].label == next(iter(expected))

    def test_errors_are_readable(self, ask: Any, service: Service) -> None:
        hub = pytest.importorskip("huggingface_hub")
        from huggingface_hub.errors import HfHubHTTPError

        for image, said, words in (
            (PHOTO.read_bytes(), {"top_k": 10_000}, "top_k is 10000"),
            (b"no image", {}, "not an image"),
        ):
            with pytest.raises(HfHubHTTPError, match=words):
                ask(image, **said)
        with pytest.raises(HfHubHTTPError, match="there is no model"):
            hub.InferenceClient(model=f"{service.url}/models/huge").image_classification(PHOTO.read_bytes())


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
class TestTorchServeByCurl:
    def curl(self, service: Service, *words: str, path: str = f"predictions/{MODEL}?r=0") -> Any:
        command = ["curl", "-sS", "--max-time", "30", f"{service.url}/{path}", *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    @pytest.mark.parametrize(
        "words",
        [
            ["-T", str(PHOTO)],
            ["-F", f"data=@{PHOTO}"],
            ["-F", f"data=<{PHOTO}"],
            ["-F", f"body=@{PHOTO}"],
            ["--data-binary", f"@{PHOTO}"],
            ["-X", "POST", "-T", str(PHOTO)],
            ["-H", "Content-Type: image/jpeg", "--data-binary", f"@{PHOTO}"],
        ],
        ids=lambda words: words[-2],
    )
    def test_each_way_to_send_a_file(self, service: Service, expected: dict[str, float], words: list[str]) -> None:
        for path in (f"predictions/{MODEL}?r=0", f"predictions/{MODEL}/1?r=0"):
            assert self.curl(service, *words, path=path) == pytest.approx(expected, abs=1e-5)

    def test_several_files_and_an_envelope(self, service: Service, expected: dict[str, float], tmp_path: Path) -> None:
        both = self.curl(service, "-F", f"data=@{PHOTO}", "-F", f"data=@{PHOTO}", "-F", "top_k=5")
        assert both == [pytest.approx(expected, abs=1e-5)] * 2
        envelope = tmp_path / "instances.json"
        envelope.write_text(json.dumps({"instances": [{"data": in_base64()}]}))
        told = self.curl(service, "-H", "Content-Type: application/json", "-d", f"@{envelope}")
        assert told == {"predictions": [pytest.approx(expected, abs=1e-5)]}

    def test_the_dial_turns_and_errors_have_a_type(self, service: Service, expected: dict[str, float]) -> None:
        turned = self.curl(service, "-T", str(PHOTO), "-H", "x-r: 16", path=f"predictions/{MODEL}")
        assert turned != pytest.approx(expected, abs=1e-5) and len(turned) == 5
        missing = self.curl(service, "-T", str(PHOTO), path="predictions/huge")
        assert (missing["code"], missing["type"]) == (404, "ModelNotFoundException")
        version = self.curl(service, "-T", str(PHOTO), path=f"predictions/{MODEL}/2")
        assert (version["code"], version["type"]) == (404, "ModelVersionNotFoundException")
        assert self.curl(service, path="ping") == {"status": "Healthy"}


def test_kserves_client_asks_by_protocol_v1(service: Service, expected: dict[str, float]) -> None:
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("kserve is not installed")
    script = Path(__file__).with_name("kserve_v1_client.py")  # whose import here would clash with Triton's messages
    command = [sys.executable, "-W", "ignore", str(script), service.url, MODEL, str(PHOTO)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["live"] is True and told["ready"] is True
    assert told["answer"] == {"predictions": [pytest.approx(expected, abs=1e-5)]}
    assert told["turned"]["predictions"][0] != told["answer"]["predictions"][0]
    out_of_range, unknown = told["errors"]
    assert "r is 999" in out_of_range and "there is no model" in unknown


class TestSageMaker:
    @pytest.fixture
    def invoke(self, service: Service) -> Any:
        boto3 = pytest.importorskip("boto3")
        from botocore.config import Config

        client = boto3.client(
            "sagemaker-runtime",
            endpoint_url=service.url,
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
            config=Config(retries={"max_attempts": 0}),
        )
        return client.invoke_endpoint

    def test_boto3_gets_labels_and_says_r_in_custom_attributes(self, invoke: Any, expected: dict[str, float]) -> None:
        for r in ("0", "16"):
            for said in (
                {"Body": PHOTO.read_bytes()},
                {"Body": PHOTO.read_bytes(), "ContentType": "image/jpeg", "TargetModel": MODEL},
                {"Body": json.dumps({"inputs": in_base64()}), "ContentType": "application/json"},
            ):
                answer = invoke(EndpointName="any", CustomAttributes=f"r={r}", **said)
                found = {each["label"]: each["score"] for each in json.loads(answer["Body"].read())}
                assert (found == pytest.approx(expected, abs=1e-5)) == (r == "0")
                assert (answer["CustomAttributes"], answer["ContentType"]) == (f"r={r}", "application/json")

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ({"Body": b"no image"}, "not an image"),
            ({"Body": b"x", "TargetModel": "huge"}, "there is no model"),
            ({"Body": b"x", "CustomAttributes": "R=8"}, "there is no parameter"),
        ],
    )
    def test_errors_are_read_as_its_own(self, invoke: Any, said: dict[str, Any], words: str) -> None:
        from botocore.exceptions import ClientError

        with pytest.raises(ClientError, match=words) as raised:
            invoke(EndpointName="any", **said)
        assert raised.value.response["Error"]["Code"] == "ValidationError"

    def test_the_containers_contract_is_kept(self, service: Service, expected: dict[str, float]) -> None:
        assert httpx.get(f"{service.url}/ping").status_code == 200
        answer = httpx.post(f"{service.url}/invocations", content=PHOTO.read_bytes(), headers={"x-r": "0"})
        assert {each["label"]: each["score"] for each in answer.json()} == pytest.approx(expected, abs=1e-5)


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def test_vertex_tells_a_container_its_routes_by_variables(start_service: StartService) -> None:
    route = "/v1/endpoints/12/deployedModels/34"
    variables = {"AIP_PREDICT_ROUTE": f"{route}:predict", "AIP_HEALTH_ROUTE": route, "AIP_HTTP_PORT": str(free_port())}
    service = start_service("--protocol", "vertex", environment=variables)
    assert httpx.get(f"{service.url}{route}").json() == {"status": "ready"}
    body = {"instances": [{"b64": in_base64()}], "parameters": {"r": 8, "top_k": 3}}
    answer = httpx.post(f"{service.url}{route}:predict", json=body)
    assert answer.headers["x-r"] == "8"
    (prediction,) = answer.json()["predictions"]
    assert prediction["displayNames"][0].startswith("beacon, lighthouse")
    assert [len(values) for values in prediction.values()] == [3, 3, 3]
    odd = httpx.post(f"{service.url}{route}:predict", json={**body, "parameters": {"maxPredictions": 3}})
    assert odd.status_code == 422 and "maxPredictions" in odd.json()["error"]["message"]


@pytest.mark.parametrize(
    ("protocol", "variable"), [("vertex", "AIP_HTTP_PORT"), ("sagemaker", "SAGEMAKER_BIND_TO_PORT")]
)
def test_a_platform_names_the_port(protocol: str, variable: str, tmp_path: Path) -> None:
    port = free_port()
    command = [*_PROGRAM, "serve", "--protocol", protocol, "--state-dir", str(tmp_path), "--backend", "torch"]
    process = subprocess.Popen(command, env={**os.environ, variable: str(port)}, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any(f"http://127.0.0.1:{port}" in line for line in process.stderr)
    finally:
        process.terminate()
        process.communicate()
