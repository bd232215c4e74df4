"""SageMaker's container contract: raw images and JSON, parameters in Custom-Attributes, the model in Target-Model."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import model_info, serving
from tests.server.faces import B64, PNG, message_of
from tests.server.test_face_huggingface import told

ATTRIBUTES, TARGET = "X-Amzn-SageMaker-Custom-Attributes", "X-Amzn-SageMaker-Target-Model"
ON: dict[str, Any] = {"protocol": "sagemaker"}


@pytest.mark.parametrize("path", ["/invocations", "/endpoints/any-name/invocations"])
@pytest.mark.parametrize(
    ("attributes", "schedule", "count", "answered"),
    [
        ("r=8", (8, 8, 8), 5, "r=8"),
        ("r=8,4;top_k=2", (8, 4, 0), 2, "r=8,4,0"),
        (" r=4 , top_k=1 ", (4, 4, 4), 1, "r=4"),
        ("r=4;inflect=-1", (8, 4, 0), 5, "r=8,4,0"),
        ("r=8;", (8, 8, 8), 5, "r=8"),
        ("", (0, 0, 0), 5, "r=0"),
    ],
)
async def test_parameters_come_and_go_in_custom_attributes(
    path: str, attributes: str, schedule: tuple[int, ...], count: int, answered: str
) -> None:
    async with serving(**ON) as service:
        for said in ({"content": PNG}, {"json": {"inputs": B64}}):
            response = await service.client.post(path, headers={ATTRIBUTES: attributes}, **said)
            assert response.status_code == 200, response.text
            assert response.json() == told(100, count, schedule)
            assert response.headers[ATTRIBUTES] == answered


async def test_custom_attributes_in_two_headers_all_count() -> None:
    async with serving(**ON) as service:
        headers = [(ATTRIBUTES, "r=8"), (ATTRIBUTES, "top_k=2")]
        response = await service.client.post("/invocations", headers=headers, content=PNG)
        assert response.json() == told(100, 2, (8, 8, 8)), response.text


async def test_target_model_names_the_model() -> None:
    async with serving(models=[model_info(), model_info("large")], **ON) as service:
        for target in ("large", "tiny"):
            await service.client.post("/invocations", content=PNG, headers={TARGET: target})
        assert [key.model for key, _ in service.device.batches] == ["large", "tiny"]
        missing = await service.client.post("/invocations", content=PNG, headers={TARGET: "huge.tar.gz"})
        assert missing.status_code == 404 and "there are: tiny, large" in message_of(missing, "sagemaker")


@pytest.mark.parametrize(
    ("headers", "status", "kind", "words"),
    [
        ({ATTRIBUTES: "R=8"}, 422, "ValidationError", "there is no parameter 'R'"),
        ({ATTRIBUTES: "r=8;top-k=1"}, 422, "ValidationError", "there is no parameter 'top-k'"),
        ({ATTRIBUTES: "trace-7"}, 422, "ValidationError", "pairs like r=8"),
        ({ATTRIBUTES: "r=8;r=8"}, 422, "ValidationError", "given twice"),
        ({ATTRIBUTES: "r=" + "1," * 600}, 422, "ValidationError", "at most 1024"),
        ({ATTRIBUTES: "model=tiny", TARGET: "tiny"}, 422, "ValidationError", "given twice"),
        ({ATTRIBUTES: "r=8", "x-r": "8"}, 422, "ValidationError", "give it once"),
        ({ATTRIBUTES: "deadline_ms=0.5"}, 422, "ValidationError", "deadline_ms"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_is_wrong_is_said_as_boto3_reads_it(
    headers: dict[str, str], status: int, kind: str, words: str
) -> None:
    async with serving(**ON) as service:
        response = await service.client.post("/invocations", content=PNG, headers=headers)
        assert (response.status_code, response.headers["x-amzn-errortype"]) == (status, kind), response.text
        assert response.json().keys() == {"message"} and words in message_of(response, "sagemaker")


async def test_attributes_and_body_do_not_say_the_same() -> None:
    async with serving(**ON) as service:
        body: Any = {"inputs": B64, "parameters": {"r": 4}}
        refused = await service.client.post("/invocations", json=body, headers={ATTRIBUTES: "r=8"})
        assert refused.status_code == 422 and "give it once" in message_of(refused, "sagemaker")


@pytest.mark.parametrize(("status", "kind"), [(401, "AccessDeniedException"), (503, "ServiceUnavailable")])
async def test_errors_have_types_that_boto3_knows(status: int, kind: str) -> None:
    async with serving(api_key="secret", **ON) as service:
        if status == 401:
            response = await service.client.post("/invocations", content=PNG)
        else:
            service.app.state.is_draining = True
            response = await service.client.get("/ping")
        assert (response.status_code, response.headers["x-amzn-errortype"]) == (status, kind)
