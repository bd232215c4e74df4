"""What holds for every test: the same random numbers each time, one torch thread, no settings of the shell, and kernels
that need no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tome_core import quiet  # noqa: F401  # tests report to nobody

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, which timm's is


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("only a GPU can run it")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the developer's shell that decides what a server does reaches a test."""
    for name in [name for name in os.environ if name.startswith("TOME_") or name == "PROMETHEUS_MULTIPROC_DIR"]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
