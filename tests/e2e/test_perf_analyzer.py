"""perf_analyzer, by which users of Triton and TorchServe measure, turns the dial with a header."""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
from pathlib import Path

import pytest

from server.model_spec import BUNDLED_NAME
from tests.e2e.perf_analyzer import PerfAnalyzer, find
from tests.e2e.service import Service

REQUESTS = 24


@pytest.fixture(scope="module")
def perf_analyzer() -> PerfAnalyzer:
    found = find(os.environ, Path(sys.executable).parent)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def answered(service: Service, r: int) -> float:
    return service.metrics().get(f'tome_requests_total{{code="200",model="{BUNDLED_NAME}",r="{r}"}}', 0)


def failed(service: Service) -> float:
    samples = service.metrics().items()
    return sum(value for name, value in samples if name.startswith("tome_requests_total") and 'code="200"' not in name)


@pytest.mark.slow
@pytest.mark.parametrize("r", [0, 8, 16])
@pytest.mark.parametrize("protocol", ["oip", "torchserve"])
def test_a_header_turns_the_dial(
    perf_analyzer: PerfAnalyzer, shared_service: Service, protocol: str, r: int, photo: bytes, tmp_path: Path
) -> None:
    data, image = tmp_path / "data.json", tmp_path / "photo.jpg"
    image.write_bytes(photo)
    inputs: dict[str, object]
    options: list[str]
    if protocol == "oip":  # the file as an element of a BYTES tensor, which has its length before it
        element = base64.b64encode(struct.pack("<I", len(photo)) + photo).decode()
        inputs, options = {"image": {"b64": element, "shape": [1]}}, []
    else:
        inputs, options = {"TORCHSERVE_INPUT": [str(image)]}, ["--service-kind", "torchserve"]
    data.write_text(json.dumps({"data": [inputs]}))
    answers_before, failures_before = answered(shared_service, r), failed(shared_service)
    report = perf_analyzer.measure(shared_service.url, BUNDLED_NAME, data, *options, r=r, requests=REQUESTS)
    assert report.per_s > 0, report.text
    assert answered(shared_service, r) - answers_before >= REQUESTS, report.text
    assert failed(shared_service) == failures_before


def write_program(folder: Path, *lines: str) -> Path:
    """A perf_analyzer of these shell lines."""
    path = folder / "perf_analyzer"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "message",
    [
        "/lib/x86_64-linux-gnu/libc.so.6: version 'GLIBC_2.38' not found (required by perf_analyzer)",
        "error while loading shared libraries: libb64.so.0d: cannot open shared object file",
    ],
)
def test_one_that_does_not_run_says_why(tmp_path: Path, message: str) -> None:
    path = write_program(tmp_path, f'echo "{message}" >&2', "exit 1")
    found = find({"PERF_ANALYZER": str(path)}, beside=tmp_path / "none")
    assert isinstance(found, str)
    assert message in found


def test_none_at_all_says_what_fetches_one(tmp_path: Path) -> None:
    found = find({"PATH": str(tmp_path)}, beside=tmp_path)
    assert isinstance(found, str)
    assert "there is no perf_analyzer" in found and "fetch_perf_analyzer.sh" in found


def test_one_that_runs_is_found_in_the_path_or_beside_python(tmp_path: Path) -> None:
    write_program(tmp_path, "exit 0")
    assert isinstance(find({"PATH": str(tmp_path)}, beside=tmp_path / "none"), PerfAnalyzer)
    assert isinstance(find({}, beside=tmp_path), PerfAnalyzer)
