"""Graphs of OpenVINO while schedules come and go: one thread owns them, and neither memory nor disk fills up."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.device import openvino_files
from server.device.backend import BackendOptions
from server.device.openvino_files import MOST_FOLDERS, MOST_TRANSLATIONS, OUTDATED_S, Translations, remove_outdated
from server.dial import Schedule
from tests.server.test_backends import images, loaded, pixels

openvino: Any = pytest.importorskip("server.device.openvino", reason="the package openvino is not installed")
compiler_of: Any = pytest.importorskip("server.device.openvino_compiler")

DAY_S = 86_400


class FakeCompiler:
    """Compiles at once, what a list does not name."""

    threads, input_size, has_bf16, graph_bytes = 1, (64, 64), False, 1

    def __init__(self, merged: Any, *args: Any) -> None:
        self.merged, self.failing, self.compiled = merged, list[Schedule](), list[Schedule]()

    def keep(self, schedule: Schedule) -> None:
        pass

    def any_batch(self, schedule: Schedule, max_batch_size: int, precision: str, aside: bool) -> Any:
        self.compiled.append(schedule)
        if schedule in self.failing:
            raise OSError("No space left on device")

        def run(images: Tensor) -> Tensor:
            with torch.inference_mode():
                return self.merged(images, schedule)  # type: ignore[no-any-return]

        return openvino.AnyBatch(run, {1: run}, 1)


class Watched(dict[Any, Any]):
    """Notes the threads that read or change it."""

    threads: set[int] = set()


for _name in (
    "__iter__",
    "__getitem__",
    "__setitem__",
    "__delitem__",
    "__ior__",
    "get",
    "pop",
    "update",
    "items",
    "keys",
):

    def _noting(self: Watched, *args: Any, _name: str = _name) -> Any:
        self.threads.add(threading.get_ident())
        return getattr(dict, _name)(self, *args)

    setattr(Watched, _name, _noting)


def made(monkeypatch: pytest.MonkeyPatch, most_schedules: int) -> Any:
    """A backend that has memory for so many schedules besides the warmed ones, of three graphs of a byte each."""
    monkeypatch.setattr(openvino, "Compiler", FakeCompiler)
    memory_bytes = 3 * (most_schedules + 1)
    options = BackendOptions("openvino", 1, max_batch_size=1, memory_bytes=memory_bytes)
    return openvino.OpenVINOBackend(loaded(), "fp32", options)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    return made(monkeypatch, 16)


def ask(backend: Any, schedule: Schedule, times: int = openvino.SEEN_OFTEN) -> None:
    """Asks for a schedule so often, and waits until nothing is compiled."""
    for _ in range(times):
        backend.outputs(pixels(1), schedule)
        settle(backend)
    backend._take_over()


def settle(backend: Any) -> None:
    """Waits until nothing is compiled."""
    while backend._later._making is not None:
        backend._later._thread.submit(lambda: None).result()


@torch.inference_mode()
def test_one_thread_has_the_graphs_whoever_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = made(monkeypatch, 3)
    backend._runs = Watched(backend._runs)
    for number in range(1, 8):
        ask(backend, (number, 0), openvino.SEEN_OFTEN + number)
    assert Watched.threads == {threading.get_ident()}
    assert list(backend._runs) == [(0, 0), (5, 0), (6, 0), (7, 0)]


@torch.inference_mode()
def test_the_graph_used_least_makes_room_and_warmed_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = made(monkeypatch, 2)
    backend.warm_up((1, 1))
    for schedule, times in (((2, 0), 9), ((3, 0), 4), ((4, 0), 5)):
        ask(backend, schedule, times)
    assert set(backend._runs) == {(0, 0), (1, 1), (2, 0), (4, 0)}


@torch.inference_mode()
def test_ever_new_schedules_compile_nothing_once_memory_is_full_and_take_it_from_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = made(monkeypatch, 2)
    for schedule in ((2, 0), (3, 0)):
        ask(backend, schedule, openvino.SEEN_OFTEN + 1)
    for number in range(4, 17):
        ask(backend, (number, 0), openvino.SEEN_OFTEN)
        ask(backend, (2, 0), 1)
        ask(backend, (3, 0), 1)
    assert set(backend._compiler.compiled) == set(backend._runs) == {(0, 0), (2, 0), (3, 0)}


@torch.inference_mode()
def test_no_more_than_fit_are_compiled_where_many_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = made(monkeypatch, 2)
    with compiler_of.TRACING:  # a compiling thread stands still before it compares
        for number in range(1, 9):
            for _ in range(openvino.SEEN_OFTEN):
                backend.outputs(pixels(1), (number, 0))
    settle(backend)
    assert len(backend._compiler.compiled) == 1 + 2


@torch.inference_mode()
@pytest.mark.parametrize("memory_bytes", [0, 3, 5])
def test_without_memory_for_two_schedules_torch_answers_all_that_nobody_warmed(
    memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "Compiler", FakeCompiler)
    options = BackendOptions("openvino", 1, max_batch_size=1, memory_bytes=memory_bytes)
    backend = openvino.OpenVINOBackend(loaded(), "fp32", options)
    ask(backend, (3, 0), 9)
    assert backend._compiler.compiled == list(backend._runs) == [(0, 0)]


def test_however_much_memory_there_is_no_more_than_so_many_schedules_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(monkeypatch, 10**6).most_schedules == openvino.MOST_SCHEDULES


@torch.inference_mode()
def test_a_schedule_is_compiled_once_it_was_asked_for_three_times(backend: Any) -> None:
    ask(backend, (3, 0), 2)
    assert backend._compiler.compiled == [(0, 0)]
    ask(backend, (3, 0), 1)
    assert (3, 0) in backend._runs


@torch.inference_mode()
def test_all_that_is_asked_for_at_once_is_compiled(backend: Any) -> None:
    asked = [(number, 0) for number in range(1, 6)]
    with compiler_of.TRACING:  # a compiling thread stands still before it compares
        for schedule in asked * openvino.SEEN_OFTEN:
            backend.outputs(pixels(1), schedule)
    settle(backend)
    backend.outputs(pixels(1), (0, 0))
    assert set(asked) < set(backend._runs)


@torch.inference_mode()
def test_a_failure_that_passes_excludes_no_schedule(backend: Any) -> None:
    backend._compiler.failing = [(3, 0)]
    ask(backend, (3, 0), openvino.SEEN_OFTEN + 1)
    assert backend._compiler.compiled.count((3, 0)) == 1  # the second time it is too early
    backend._compiler.failing = []
    backend._later._clock = lambda: time.monotonic() + 61
    ask(backend, (3, 0), 1)
    assert (3, 0) in backend._runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ("ab" * 12)


def translate(files: Translations, schedule: Schedule, unused_s: float) -> None:
    """Files as a translation leaves them, last used so long ago."""
    graph = files.graph(schedule)
    files.compiled(schedule).mkdir(parents=True)
    for each in (graph, graph.with_suffix(".bin"), files.compiled(schedule) / "1.blob"):
        each.write_text("x")
    _age(graph, unused_s)


def _age(path: Path, unused_s: float) -> None:
    then = time.time() - unused_s  # noqa: TID251 - a file's own clock
    os.utime(path, (then, then))


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_the_translations_used_longest_ago_make_room_with_all_that_is_of_them(folder: Path) -> None:
    files = Translations(folder)
    many = MOST_TRANSLATIONS + 4
    for number in range(many):
        translate(files, (number, 0), 1000 - number)
    files.keep((0, 0))
    assert files.use((1, 0)) and not files.use((99, 0))
    files.make_room()
    kept = {0, 1, *range(many - MOST_TRANSLATIONS + 1, many)}
    assert names(folder) == {f"r{n}-0{end}" if n else f"r0{end}" for n in kept for end in (".xml", ".bin", ".compiled")}


@pytest.mark.parametrize(("free", "kept"), [(0, 1), (100, 2), (160, 4), (10**6, 8)])
def test_translations_take_a_tenth_of_the_disk_and_the_latest_stays(
    free: int, kept: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of 5 bytes each, and one that is warmed and counts for nothing."""
    files = Translations(folder)
    for number in range(9):
        translate(files, (1 + number, 0), 1000 - number)
        files.graph((1 + number, 0)).with_suffix(".bin").write_text("xxx")
    files.keep((1, 0))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    files.make_room()
    assert {each.stem for each in folder.glob("*.xml")} == {"r1-0"} | {f"r{9 - number}-0" for number in range(kept)}
    assert len(list(folder.iterdir())) == 3 * (1 + kept)


def test_files_that_vanish_meanwhile_are_no_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Translations(folder)
    for number in range(MOST_TRANSLATIONS + 2):
        translate(files, (number, 1), number)
    glob = Path.glob

    def glob_and_lose(self: Path, pattern: str) -> Iterator[Path]:
        found = list(glob(self, pattern))
        for each in found[::2]:
            each.unlink()
        yield from found

    monkeypatch.setattr(Path, "glob", glob_and_lose)
    files.make_room()
    files.remove((1, 1))
    files.remove((99, 1))


def test_what_nobody_has_used_for_long_is_removed_and_nothing_that_is_not_ours(tmp_path: Path) -> None:
    def made(name: str, unused_s: float) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "r0.bin").touch()
        _age(tmp_path / name, unused_s)

    for number in range(MOST_FOLDERS + 3):
        made(f"{number:024x}", 2 * DAY_S + number)
    made("f" * 24, 0.9 * DAY_S)
    made("e" * 24, OUTDATED_S + DAY_S)
    made("tmpold", 2 * DAY_S)
    made("tmpnew", 0)
    made("photos", 9 * OUTDATED_S)
    for name, unused_s in (("merge_tokens-old.so", OUTDATED_S + 9), ("merge_tokens-new.so", OUTDATED_S - 9)):
        (tmp_path / name).touch()
        _age(tmp_path / name, unused_s)
    remove_outdated(tmp_path)
    recent = {f"{number:024x}" for number in range(MOST_FOLDERS - 1)}  # and the one of today
    assert names(tmp_path) == recent | {"f" * 24, "tmpnew", "photos", "merge_tokens-new.so"}


def test_folders_of_today_stay_however_many_they_are(tmp_path: Path) -> None:
    for number in range(3 * MOST_FOLDERS):
        Translations(tmp_path / f"{number:024x}")
    remove_outdated(tmp_path)
    assert len(names(tmp_path)) == 3 * MOST_FOLDERS


def test_a_start_and_a_use_make_a_folder_one_of_today(folder: Path) -> None:
    folder.mkdir()
    for _ in range(2):
        _age(folder, OUTDATED_S + DAY_S)
        files = Translations(folder)
        assert openvino_files._unused_s(folder) < DAY_S
    _age(folder, OUTDATED_S + DAY_S)
    files.use((3, 0))
    assert openvino_files._unused_s(folder) < DAY_S


def test_what_a_killed_translation_left_is_removed_a_day_later(folder: Path) -> None:
    for name, unused_s in (("tmpold", 2 * DAY_S), ("tmpnew", 60)):
        (folder / name).mkdir(parents=True)
        _age(folder / name, unused_s)
    Translations(folder)
    assert names(folder) == {"tmpnew"}


@torch.inference_mode()
@pytest.mark.parametrize("lost", ["graph", "weights", "compiled", "folder", "spoilt"])
def test_a_translation_that_another_server_removed_is_made_again(lost: str, tmp_path: Path) -> None:
    model = loaded()
    compiler = compiler_of.Compiler(model.merged, (64, 64), 1, tmp_path)
    wanted = compiler.graph((3, 0), 1, "fp32")(images(1))
    graph = compiler._files.graph((3, 0))
    if lost == "graph":
        graph.unlink()
    elif lost == "weights":
        graph.with_suffix(".bin").unlink()
    elif lost == "compiled":
        openvino_files._remove(graph.with_suffix(".compiled"))
    elif lost == "folder":
        openvino_files._remove(graph.parent)
    else:
        graph.write_bytes(b"")  # a machine that lost its power
    again = compiler.graph((3, 0), 1, "fp32")
    torch.testing.assert_close(again(images(1)), wanted, atol=1e-5, rtol=1e-5)
    assert graph.exists() and graph.with_suffix(".bin").exists()


@torch.inference_mode()
def test_the_disk_holds_so_many_translations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_files, "MOST_TRANSLATIONS", 2)
    model = loaded()
    compiler = compiler_of.Compiler(model.merged, (64, 64), 1, tmp_path)
    compiler.keep((0, 0))
    for schedule in ((0, 0), (1, 0), (2, 0), (3, 0)):
        compiler.graph(schedule, 1, "fp32")
    assert {each.stem for each in compiler._files.graph((0, 0)).parent.iterdir()} == {"r0", "r2-0", "r3-0"}
    run = compiler.graph((1, 0), 1, "fp32")
    torch.testing.assert_close(run(images(1)), model.merged(images(1), (1, 0)), atol=1e-4, rtol=1e-4)
