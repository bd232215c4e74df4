"""The image, built once, and what runs of it."""

from __future__ import annotations

import fcntl
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docker.cli import ROOT, docker, need_docker
from tests.docker.container import Container, Run
from tests.docker.stack import Stack

Build = Callable[[str, str], str]
TAG = "tome-server:test"
BUILD_OPTIONS = "DOCKER_BUILD_OPTIONS"
LOCK = Path(tempfile.gettempdir()) / "tome-server-test.lock"


@pytest.fixture(scope="session")
def image() -> str:
    """The image of this working tree. `DOCKER_BUILD_OPTIONS` goes to docker build, as in the Makefile."""
    need_docker()
    before = docker("images", "--quiet", TAG)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # .ci/run builds it too, beside the other tests
        docker("build", *shlex.split(os.environ.get(BUILD_OPTIONS, "")), "--tag", TAG, ".")
    if before and before != docker("images", "--quiet", TAG):
        docker("rmi", before)  # images are large: none without a name stays
    return TAG


@pytest.fixture(scope="session")
def photo() -> bytes:
    return (ROOT / "server/static/samples/lighthouse.jpg").read_bytes()


@pytest.fixture
def run(image: str) -> Iterator[Run]:
    """Runs containers of the image, which end with the test."""
    running: list[Container] = []

    def start(*flags: str) -> Container:
        running.append(Container(image, *flags))
        return running[-1]

    yield start
    for container in running:
        container.remove()


@pytest.fixture(scope="module")
def build(image: str) -> Iterator[Build]:
    """Builds a version under a tag, at no cost: the image and a line more of a Dockerfile.

    The tags go when no container runs them: an image that loses its tag before would stay.
    """
    tags = []

    def derive(version: str, line: str) -> str:
        tag = f"tome-server:test-{version}"
        docker("build", "--tag", tag, "-", text=f"FROM {image}\n{line}\n")
        tags.append(tag)
        return tag

    yield derive
    for tag in tags:
        docker("rmi", tag)


@pytest.fixture(scope="module")
def stack(image: str, build: Build) -> Iterator[Stack]:
    """Three servers behind HAProxy, for all tests of a module; each leaves three that are ready."""
    stack = Stack(f"tome-test-{os.getpid()}", image)
    try:
        stack.scale(3)
        yield stack
    finally:
        stack.down()
