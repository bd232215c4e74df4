"""What holds for every test: the same random numbers each time, one torch thread, no settings of the shell, no clock
but that of pytest-timeout, and kernels that need no GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from hypothesis import HealthCheck, settings

from tome_core import quiet  # noqa: F401  # tests report to nobody

# A busy machine is no error; pytest-timeout ends a test that hangs. httpx gives up after 5 s, hypothesis after 0.2 s.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
for phase in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, phase, None)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, which timm's is


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the garbage collector off what lives to the end: it went through torch and 9,000 tests every few tests."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else bindings such as Triton's report leaks at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real processes come first, for a short rest at the end; containers later, as their image is still being built."""
    order = {"e2e": 0, "ray": 1, "core": 2, "docker": 3}
    items.sort(key=lambda item: order.get(item.path.parent.name, 4))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several workers one takes a whole file, which starts its server once, and all that needs the Docker engine."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "docker" if nodeid.startswith("tests/docker/") else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


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
