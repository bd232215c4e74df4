"""Every operation of the API's description under schemathesis: what it allows, and what it does not, gets no 5xx.

A deadline may be too short for any answer: that one 504 is the client's own wish.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.transport.serialization import Binary

from server.model_spec import BUNDLED_NAME
from server.settings import Protocol
from tests.e2e.service import Service
from tests.server.conftest import grey_png

pytestmark = pytest.mark.slow

PROTOCOLS: tuple[str, ...] = get_args(Protocol)
NATIVE = "native"
EXAMPLES = 17
"""For each operation and each way to send it."""

PHOTO = grey_png()
TENSOR: Any = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(PHOTO).decode()]}
SENT = AS_IT_IS, PHOTOS, PHOTOS_ALONE = "as it is", "with photos", "with photos and no parameters"
IMAGES = ("image", "images", "input", "inputs", "instances", "data", "b64", "body")
"""Fields that hold images."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real service on which every face is on."""
    service = Service("--protocol", ",".join(PROTOCOLS), state_dir=tmp_path_factory.mktemp("state"))
    service.wait_until_ready()
    yield service
    assert service.stop() == 0


@pytest.fixture(scope="module")
def operations(service: Service) -> dict[str, list[Any]]:
    """The operations of each face."""
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    faces: dict[str, list[Any]] = {face: [] for face in (NATIVE, *PROTOCOLS)}
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        faces[(operation.tags or [NATIVE])[0]].append(operation)
    return faces


def with_photos(body: Any) -> Any:
    """A body with a photo wherever it may hold one: bytes alone, and texts in the fields for images."""
    if isinstance(body, bytes | Binary):
        return PHOTO
    if isinstance(body, dict):
        return {name: _photos(value) if name in IMAGES else with_photos(value) for name, value in body.items()}
    return [with_photos(each) for each in body] if isinstance(body, list) else body


def _photos(value: Any) -> Any:
    """The same, where every text is to be a photo."""
    if isinstance(value, list):
        return [_photos(each) for each in value]
    is_text = isinstance(value, str) and not isinstance(value, Binary)
    return base64.b64encode(PHOTO).decode() if is_text else with_photos(value)


def send(case: schemathesis.Case[Any], sent: str) -> None:
    """Changes a request to how it is sent."""
    if sent == AS_IT_IS:
        return
    if "name" in case.path_parameters and not case.path.startswith("/v2/repository"):  # it must stay loaded
        case.path_parameters["name"] = BUNDLED_NAME
    if "version" in case.path_parameters:
        case.path_parameters["version"] = "1"
    case.body = with_photos(case.body)
    if sent == PHOTOS_ALONE:
        case.query = {}
        if case.path.endswith("/infer"):  # a tensor has a shape, which nobody guesses
            case.body = {"inputs": [TENSOR]}
        elif isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name in IMAGES}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("face", [NATIVE, *PROTOCOLS])
def test_no_request_gets_a_5xx(face: str, mode: GenerationMode, operations: dict[str, list[Any]]) -> None:
    assert operations[face], "the face is described"
    answered = set()
    for operation, sent in product(operations[face], SENT):

        @given(case=operation.as_strategy(generation_mode=mode), sent=st.just(sent))
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case[Any], sent: str) -> None:
            send(case, sent)
            response = case.call(timeout=60)
            answered.add((case.method, response.status_code))
            is_late = response.status_code == 504 and "no answer within" in response.text
            assert response.status_code < 500 or is_late, f"{case.as_curl_command()}: {response.text}"

        with contextlib.suppress(Unsatisfiable):  # an operation that takes nothing can be asked nothing wrong
            ask()
    if mode is GenerationMode.POSITIVE:
        assert ("POST", 200) in answered, "no photo has reached the model"
