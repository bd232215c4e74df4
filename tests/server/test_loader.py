"""Real models that come and go on the CPU: versions on disk, what computes them, and whether their memory is freed."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from server.batching.engine import LocalEngine
from server.cli import main
from server.config.model_set import ModelSet
from server.device import runner
from server.engine_process import build_engine
from server.errors import InvalidError, NotFoundError, SettingsError
from server.images.image import Pixels
from server.ipc.messages import Classify, Explain, Merges, TopK
from server.loader import ModelLoader
from server.settings import Settings
from server.settings_sources import load_settings
from tests.server.conftest import until
from tests.server.model_folders import edit, load, random_vit

SIDE = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: `cats` in two versions of 5 and 7 classes, and `dogs`."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "cats").mkdir()
    random_vit(folder / "cats/1", num_classes=5)
    random_vit(folder / "cats/2", num_classes=7)
    random_vit(folder / "dogs", num_classes=3)
    return folder


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(made, tmp_path / "repository")
    return tmp_path / "repository"


def settings(repository: Path, **more: Any) -> Settings:
    said = {"model": [f"local-dir:{repository}/dogs"], "model_repository": str(repository), "state_dir": "none"}
    return load_settings(said | {"backend": "torch", "max_batch_size": 2, "drift_sample": 0} | more)


@asynccontextmanager
async def serving(told: Settings, models: ModelSet | None = None) -> AsyncIterator[LocalEngine]:
    engine = build_engine(told, models=models)
    engine._linger_s = 0.0
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def asked(name: str, kind: Any = Classify) -> Any:
    pixels = bytes(range(256)) * (SIDE * SIDE * 3 // 256)
    return kind(model=name, images=[Pixels(pixels)], r=(1, 1, 1, 1), deadline=time.monotonic() + 50, top_k=3)


async def scores(engine: LocalEngine, name: str) -> TopK:
    (top_k,) = (await engine.answer(asked(name))).results
    assert isinstance(top_k, TopK)
    return top_k


def expected(folder: Path) -> TopK:
    """What a model says that nothing else was loaded beside."""
    loaded = load(folder)
    pixels = torch.frombuffer(bytearray(asked("mine").images[0].data), dtype=torch.uint8).view(1, SIDE, SIDE, 3)
    alone = runner.Runner({"mine": loaded}, "cpu", "fp32")
    ((indices, found),) = alone.top_k(loaded.info.batch_key((1, 1, 1, 1)), pixels, 3)
    return TopK(indices, found)


async def test_each_version_computes_what_it_computes_alone(repository: Path) -> None:
    async with serving(settings(repository)) as engine:
        before = await scores(engine, "dogs")
        for version, classes in (("1", 5), ("2", 7), ("1", 5)):
            await engine.load("cats", version)
            info = engine.catalog()["cats"]
            assert (info.version, len(info.labels), info.source) == (
                version,
                classes,
                f"local-dir:{repository}/cats/{version}",
            )
            assert info.backend is not None and info.backend.name == "torch"
            found, alone = await scores(engine, "cats"), expected(repository / "cats" / version)
            assert found.indices == alone.indices and found.scores == pytest.approx(alone.scores, rel=1e-4)
            (merges,) = (await engine.answer(asked("cats", Explain))).results
            assert isinstance(merges, Merges) and len(merges.groups) == info.num_blocks
        assert await scores(engine, "dogs") == before


@pytest.mark.parametrize("backend", ["torch", "openvino"])
async def test_the_memory_of_a_model_that_goes_is_freed(
    repository: Path, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # what torch logs of a translation, at debug, holds tensors
    if backend == "openvino":
        pytest.importorskip("openvino")
    told = settings(repository, backend=backend, precision="fp32", state_dir=str(tmp_path / "state"))
    async with serving(told) as engine:
        gc.collect()  # as a process does once it has started: a translation leaves cycles that hold the weights
        await engine.load("cats", "1")
        await scores(engine, "cats")
        assert engine._loading is not None
        loader = engine._loading._loader
        assert isinstance(loader, ModelLoader)
        devices = loader.device._models
        held = {
            name: weakref.ref(next(device._runner.merged(name).parameters())) for (name, _), device in devices.items()
        }
        del devices
        await engine.unload("cats")
        await engine.unload("dogs")
        await until(lambda: len(loader.device) == 0 and not engine._loading._going)  # type: ignore[union-attr]
        await until(lambda: all(weight() is None for weight in held.values()))  # once the compiling thread has ended


async def test_files_that_have_changed_are_loaded_again_and_others_are_not(repository: Path) -> None:
    loader = ModelLoader(settings(repository))
    first = loader.find("dogs")
    assert loader.find("dogs") == first and loader.find("dogs", "1") == first
    async with serving(settings(repository)) as engine:
        before = engine.catalog()["dogs"]
        await engine.load("dogs")
        assert engine.catalog()["dogs"] is before
        shutil.rmtree(repository / "dogs")
        random_vit(repository / "dogs", num_classes=4)
        await engine.load("dogs")
        assert len(engine.catalog()["dogs"].labels) == 4 and engine.catalog()["dogs"].revision != before.revision
        assert (await scores(engine, "dogs")).indices


async def test_a_weights_file_of_another_time_is_another_revision(repository: Path) -> None:
    loader = ModelLoader(settings(repository))
    before, file = loader.find("dogs"), repository / "dogs/model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert loader.find("dogs").revision != before.revision
    assert loader.find("cats", "1").revision != loader.find("cats", "2").revision


async def test_a_folder_that_comes_while_the_server_runs_is_found(repository: Path) -> None:
    async with serving(settings(repository)) as engine:
        random_vit(repository / "cats/10", num_classes=6)
        random_vit(repository / "birds", num_classes=2)
        await engine.load("cats")
        await engine.load("birds")
        assert engine.catalog()["cats"].version == "10"
        assert [(each.name, each.version) for each in await engine.repository()] == [
            ("dogs", "1"),
            ("birds", "1"),
            ("cats", "1"),
            ("cats", "2"),
            ("cats", "10"),
        ]


async def test_a_model_that_is_broken_is_refused_in_the_sentence_of_a_start(repository: Path) -> None:
    edit(repository / "cats/2", lambda config: config.update(architecture="vit_of_mine"))
    (repository / "cats/1/model.safetensors").write_bytes(b"spoilt")
    async with serving(settings(repository)) as engine:
        with pytest.raises(InvalidError, match=r"model cats: .*timm has no architecture 'vit_of_mine'"):
            await engine.load("cats")
        with pytest.raises(InvalidError, match="model cats: .*is not a safetensors file"):
            await engine.load("cats", "1")
        with pytest.raises(InvalidError, match="has no version '3'; it has: 1, 2"):
            await engine.load("cats", "3")
        assert list(engine.catalog()) == ["dogs"]


def test_a_model_that_is_no_folder_has_one_version() -> None:
    loader = ModelLoader(load_settings({"state_dir": "none"}))
    (name,) = loader.available()
    assert loader.find(name, "1") == loader.find(name)
    with pytest.raises(SettingsError, match="bundled has one version, 1"):
        loader.find(name, "2")


def test_a_repository_that_is_not_there_ends_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert main(["serve", "--model-repository", str(missing), "--state-dir", "none"]) == 2
    assert f"model repository {missing} cannot be read" in capsys.readouterr().err
    ModelLoader(load_settings({"model_repository": str(missing)}))  # an engine that starts again


async def test_a_start_brings_back_what_was_loaded_and_leaves_out_what_was_unloaded(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = settings(repository, state_dir=str(tmp_path / "state"))
    async with serving(told, ModelSet(told)) as engine:
        await engine.load("cats", "1")
        await engine.configure({"cats": 2}, None)
        await engine.unload("dogs")
    async with serving(told, ModelSet(told)) as engine:
        assert {name: info.version for name, info in engine.catalog().items()} == {"cats": "1"}
        assert (await engine.configuration()).models == {"cats": 2}
        await engine.load("dogs")
        assert list(engine.catalog()) == ["cats", "dogs"]
        await engine.load("cats", "2")
    shutil.rmtree(repository / "cats/2")
    async with serving(told, ModelSet(told)) as engine:
        assert list(engine.catalog()) == ["dogs"]
        assert "has no version '2'; it has: 1; it was loaded before the restart, and is not loaded now" in caplog.text
        with pytest.raises(NotFoundError):
            await engine.answer(asked("cats"))
        await engine.unload("dogs")
    async with serving(told, ModelSet(told)) as engine:
        assert engine.catalog() == {}
        await engine.check()
        await engine.load("dogs")
        assert (await scores(engine, "dogs")).indices


def test_a_model_that_fails_once_it_is_on_the_device_is_closed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no facts")

    closed: list[runner.Runner] = []
    monkeypatch.setattr(runner.Runner, "close", lambda self: closed.append(self))
    loader = ModelLoader(settings(repository))
    loader.load(loader.find("dogs"), 0, lambda work: work())
    assert closed == []
    monkeypatch.setattr("server.loader.facts_of", fails)
    with pytest.raises(RuntimeError, match="no facts"):
        loader.load(loader.find("dogs"), 0, lambda work: work())
    assert len(closed) == 1


def break_cats(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has cats fail with this error when they are made ready."""
    make_ready = ModelLoader.make_ready

    def broken(self: ModelLoader, found: Any, *args: Any, **more: Any) -> Any:
        if found.name == "cats":
            raise error
        return make_ready(self, found, *args, **more)

    monkeypatch.setattr(ModelLoader, "make_ready", broken)


async def test_a_model_that_gives_no_numbers_is_not_brought_back_and_stops_no_start(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = settings(repository, state_dir=str(tmp_path / "state"))
    ModelSet(told).keep("cats", "1")
    break_cats(InvalidError("cats computes nothing"), monkeypatch)
    async with serving(told, ModelSet(told)) as engine:
        assert list(engine.catalog()) == ["dogs"]
        assert (await engine.configuration()).models == {"dogs": 0}


async def test_a_model_that_runs_out_of_memory_is_not_brought_back_and_stops_no_start(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = settings(repository, state_dir=str(tmp_path / "state"))
    ModelSet(told).keep("cats", "1")
    break_cats(torch.OutOfMemoryError("no room"), monkeypatch)
    async with serving(told, ModelSet(told)) as engine:
        assert list(engine.catalog()) == ["dogs"]
    assert (
        "model cats cannot be loaded: no room; it was loaded before the restart, and is not loaded now" in caplog.text
    )


async def test_a_repository_that_goes_away_takes_neither_the_index_nor_the_live_r(
    repository: Path, tmp_path: Path
) -> None:
    model = f"local-dir:{shutil.move(repository / 'dogs', tmp_path / 'dogs')}"
    told = settings(repository, model=[model], state_dir=str(tmp_path / "state"))
    async with serving(told, ModelSet(told)) as engine:
        await engine.load("cats", "1")
        repository.rename(tmp_path / "elsewhere")
        states = await engine.repository()
        assert [(each.name, each.state) for each in states] == [("dogs", "READY"), ("cats", "READY")]
        configuration = await engine.configure({"dogs": 1, "cats": 2}, None)
        assert configuration.models == (await engine.configuration()).models == {"dogs": 1, "cats": 2}
        with pytest.raises(InvalidError, match="cannot be read"):
            await engine.load("cats", "2")
        assert (await scores(engine, "cats")).indices


async def test_openvino_compiles_a_model_beside_one_that_answers(repository: Path, tmp_path: Path) -> None:
    """torch traces nothing in this process meanwhile: a model that runs while it does fails."""
    pytest.importorskip("openvino")
    told = settings(repository, backend="openvino", precision="fp32", state_dir=str(tmp_path / "state"))
    async with serving(told) as engine:
        loading = asyncio.create_task(engine.load("cats", "1"))
        num_answers = 0
        while not loading.done():
            r = (num_answers % 9, num_answers // 9 % 9, num_answers // 81 % 9, 1)  # which torch answers
            request = structs.replace(asked("dogs"), r=r)
            assert (await engine.answer(request)).results
            num_answers += 1
        await loading
        assert num_answers > 0
        backend = engine.catalog()["cats"].backend
        assert backend is not None and backend.name == "openvino"
        found, alone = await scores(engine, "cats"), expected(repository / "cats/1")
        assert found.scores == pytest.approx(alone.scores, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "device"])
async def test_a_gpu_takes_a_model_beside_one_that_answers(repository: Path, decode: str) -> None:
    """Nothing is recorded beside a batch, and what was recorded of either model computes what it should."""
    told = settings(repository, backend="auto", device="cuda", precision="fp32", decode=decode, max_batch_size=4)
    async with serving(told) as engine:
        alone = await scores(engine, "dogs")
        loading = asyncio.create_task(engine.load("cats", "1"))
        while not loading.done():
            assert (await scores(engine, "dogs")).scores == pytest.approx(alone.scores, rel=1e-3)
        await loading
        assert (await scores(engine, "cats")).scores == pytest.approx(expected(repository / "cats/1").scores, rel=1e-2)
        before = torch.cuda.memory_allocated()
        await engine.unload("cats")
        await until(lambda: engine._loading is not None and not engine._loading._going)
        assert torch.cuda.memory_allocated() < before
        assert (await scores(engine, "dogs")).scores == pytest.approx(alone.scores, rel=1e-3)
