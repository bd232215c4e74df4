"""Graphs of OpenVINO while schedules come and go: one thread owns them, and neither memory nor disk fills up."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.device import openvino_files, translation
from server.device.backend import BackendOptions
from server.device.openvino_files import OUTDATED_S, Translations, make_room
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

    def close(self) -> None:
        pass

    def any_batch(self, schedule: Schedule, max_batch_size: int, precision: str, sizes: Any, aside: bool) -> Any:
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


def ask(backend: Any, schedule: Schedule, times: int = 1) -> None:
    """Asks for a schedule so often, and waits until nothing is compiled."""
    for _ in range(times):
        backend.outputs(pixels(1), schedule)
        settle(backend)
    backend._take_over()


def settle(backend: Any) -> None:
    """Waits until nothing is compiled."""
    if (thread := backend._later.thread) is not None:
        thread.join()


@torch.inference_mode()
def test_one_thread_has_the_graphs_whoever_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = made(monkeypatch, 3)
    backend._runs = Watched(backend._runs)
    for number in range(1, 8):
        ask(backend, (number, 0), 1 + number)
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
        ask(backend, schedule, 4)
    for number in range(4, 17):
        ask(backend, (number, 0), 3)
        ask(backend, (2, 0), 1)
        ask(backend, (3, 0), 1)
    assert set(backend._compiler.compiled) == set(backend._runs) == {(0, 0), (2, 0), (3, 0)}


@torch.inference_mode()
def test_no_more_than_fit_are_compiled_where_many_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = made(monkeypatch, 2)
    with compiler_of.TRACING:  # a compiling thread stands still before it compares
        for number in range(1, 9):
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
def test_the_first_request_for_a_schedule_has_it_compiled_and_says_what_the_fallback_was(backend: Any) -> None:
    assert backend.computed_by((0, 0)) == ("openvino", "fp32", False)
    backend.outputs(pixels(1), (3, 0))
    assert backend.computed_by((3, 0)) == ("torch", "fp32", True)
    settle(backend)
    backend.outputs(pixels(1), (3, 0))
    assert backend.computed_by((3, 0)) == ("openvino", "fp32", False)
    assert backend._compiler.compiled == [(0, 0), (3, 0)]


@torch.inference_mode()
def test_what_is_planned_is_compiled_in_its_order_after_what_requests_ask_for(backend: Any) -> None:
    told: list[Schedule] = []
    with compiler_of.TRACING:  # a compiling thread stands still before it compares
        backend.compile_later([(4, 0), (2, 0), (0, 0), (1, 0)], told.append)
        backend.outputs(pixels(1), (7, 0))
        backend.outputs(pixels(1), (1, 0))
        assert backend.compiling() == ((4, 0), 0, 4)
    settle(backend)
    assert told == [(4, 0), (7, 0), (1, 0), (2, 0)] == backend._compiler.compiled[1:]
    assert backend.compiling() is None


@torch.inference_mode()
def test_no_request_takes_the_place_of_what_is_planned_and_the_plan_leaves_some_for_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = made(monkeypatch, 4)
    backend.compile_later([(number, 0) for number in range(1, 6)], lambda schedule: None)
    settle(backend)
    for number in range(6, 12):
        ask(backend, (number, 1), number)
    planned = {(1, 0), (2, 0), (3, 0)}  # three quarters of the places
    assert set(backend._runs) == {(0, 0), *planned, (11, 1)}


@torch.inference_mode()
def test_what_is_warmed_is_compiled_for_one_image_at_the_start_and_for_batches_in_the_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[Any] = []
    any_batch = FakeCompiler.any_batch

    def noting(self: FakeCompiler, *args: Any, **named: Any) -> Any:
        sizes.append((args[0], *args[3:]))
        return any_batch(self, *args, **named)

    monkeypatch.setattr(FakeCompiler, "any_batch", noting)
    monkeypatch.setattr(openvino, "Compiler", FakeCompiler)
    options = BackendOptions("openvino", 1, max_batch_size=1, memory_bytes=60, in_background=True)
    backend = openvino.OpenVINOBackend(loaded(), "fp32", options)
    backend.compile_later([(0, 0), (3, 0), (4, 0)], lambda schedule: None)
    settle(backend)
    assert sizes == [((0, 0), (), False), ((3, 0), (4,), True), ((0, 0), None, True), ((4, 0), (4,), True)]


def test_a_model_that_is_refused_leaves_no_translation_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[FakeCompiler] = []

    def refuse(self: FakeCompiler, *args: Any, **named: Any) -> Any:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(FakeCompiler, "any_batch", refuse)
    monkeypatch.setattr(FakeCompiler, "close", lambda self: closed.append(self))
    monkeypatch.setattr(openvino, "Compiler", FakeCompiler)
    with pytest.raises(RuntimeError, match="no such operator"):
        openvino.OpenVINOBackend(loaded(), "fp32", BackendOptions("openvino", 1))
    assert len(closed) == 1


@torch.inference_mode()
def test_once_closed_nothing_more_is_compiled(backend: Any) -> None:
    backend.close()
    backend.compile_later([(1, 0)], lambda schedule: None)
    ask(backend, (3, 0), 3)
    assert backend._compiler.compiled == [(0, 0)]


@torch.inference_mode()
def test_all_that_is_asked_for_at_once_is_compiled(backend: Any) -> None:
    asked = [(number, 0) for number in range(1, 6)]
    with compiler_of.TRACING:  # a compiling thread stands still before it compares
        for schedule in asked:
            backend.outputs(pixels(1), schedule)
    settle(backend)
    backend.outputs(pixels(1), (0, 0))
    assert set(asked) < set(backend._runs)


@torch.inference_mode()
def test_a_failure_that_passes_excludes_no_schedule(backend: Any) -> None:
    backend._compiler.failing = [(3, 0)]
    ask(backend, (3, 0), 2)
    assert backend._compiler.compiled.count((3, 0)) == 1  # the second time it is too early
    backend._compiler.failing = []
    backend._later._clock = lambda: time.monotonic() + 61
    ask(backend, (3, 0), 1)
    assert (3, 0) in backend._runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ("ab" * 12)


def translate(files: Translations, name: str, unused_s: float) -> None:
    """Files as a translation of ten bytes leaves them, last used so long ago."""
    graph = files.graph(name)
    graph.write_text("xml")
    graph.with_suffix(".bin").write_text("weights")
    _age(graph, unused_s)


def _age(path: Path, unused_s: float) -> None:
    then = time.time() - unused_s  # noqa: TID251 - a file's own clock
    os.utime(path, (then, then))


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def bytes_in(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


@pytest.mark.parametrize(("free", "most", "kept"), [(0, 10**6, 8), (10**9, 55, 5), (500, 10**6, 5), (10**9, 10**9, 8)])
def test_of_all_models_the_translations_used_longest_ago_make_room(
    free: int, most: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of 10 bytes each in the folders of two models: by bytes, or by a tenth of the disk."""
    models = [Translations(tmp_path / (letter * 24)) for letter in "ab"]
    for number in range(8):
        translate(models[number % 2], f"r{number}", 1000 - number)
    monkeypatch.setattr(openvino_files, "MOST_BYTES", most)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if free == 0:
        monkeypatch.setattr(openvino_files, "DISK_SHARE", 1.0)
    make_room(tmp_path)
    left = {each.stem for each in tmp_path.rglob("*.xml")}
    assert left == {f"r{number}" for number in range(8 - kept, 8)}
    assert bytes_in(tmp_path) == 10 * kept


def test_what_is_kept_stays_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_files, "MOST_BYTES", 35)
    files = Translations(tmp_path / ("a" * 24))
    for number in range(6):
        translate(files, f"r{number}", 1000 - number)
    files.keep("r0")
    assert files.use("r1") and not files.use("r99")
    make_room(tmp_path, files.kept)
    assert {each.stem for each in files.folder.glob("*.xml")} == {"r0", "r1", "r5"}


def test_compiled_graphs_that_an_older_version_kept_go_with_their_translation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Translations(tmp_path / ("a" * 24))
    translate(files, "r4", 10)
    (files.folder / "r4.compiled").mkdir()
    (files.folder / "r4.compiled" / "1.blob").write_text("graph")
    monkeypatch.setattr(openvino_files, "MOST_BYTES", 0)
    make_room(tmp_path)
    assert bytes_in(tmp_path) == 0


def test_files_that_vanish_meanwhile_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_files, "MOST_BYTES", 20)
    files = Translations(tmp_path / ("a" * 24))
    for number in range(18):
        translate(files, f"r{number}", number)
    glob = Path.glob

    def glob_and_lose(self: Path, pattern: str) -> Iterator[Path]:
        found = list(glob(self, pattern))
        for each in found[::2]:
            each.unlink()
        yield from found

    monkeypatch.setattr(Path, "glob", glob_and_lose)
    make_room(tmp_path)
    files.remove("r1")
    files.remove("r99")


def test_what_nobody_has_used_for_long_is_removed_and_nothing_that_is_not_ours(tmp_path: Path) -> None:
    def made(name: str, unused_s: float) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "r0.bin").touch()
        _age(tmp_path / name, unused_s)

    made("f" * 24, OUTDATED_S - DAY_S)
    made("e" * 24, OUTDATED_S + DAY_S)
    made("tmpold", 2 * DAY_S)
    made("tmpnew", 0)
    made("photos", 9 * OUTDATED_S)
    for name, unused_s in (("merge_tokens-old.so", OUTDATED_S + 9), ("merge_tokens-new.so", OUTDATED_S - 9)):
        (tmp_path / name).touch()
        _age(tmp_path / name, unused_s)
    make_room(tmp_path)
    assert names(tmp_path) == {"f" * 24, "tmpnew", "photos", "merge_tokens-new.so"}


def test_a_start_and_a_use_make_a_folder_one_of_today(folder: Path) -> None:
    folder.mkdir()
    for _ in range(2):
        _age(folder, OUTDATED_S + DAY_S)
        files = Translations(folder)
        assert openvino_files._unused_s(folder) < DAY_S
    _age(folder, OUTDATED_S + DAY_S)
    files.use("r3-0")
    assert openvino_files._unused_s(folder) < DAY_S


def test_what_a_killed_translation_left_is_removed_a_day_later(folder: Path) -> None:
    for name, unused_s in (("tmpold", 2 * DAY_S), ("tmpnew", 60)):
        (folder / name).mkdir(parents=True)
        _age(folder / name, unused_s)
    Translations(folder)
    assert names(folder) == {"tmpnew"}


@torch.inference_mode()
@pytest.mark.parametrize("lost", ["graph", "weights", "folder", "spoilt"])
def test_a_translation_that_another_server_removed_is_made_again(lost: str, tmp_path: Path) -> None:
    model = loaded()
    compiler = compiler_of.Compiler(model.merged, (64, 64), 1, tmp_path)
    wanted = compiler.graph((3, 0), 1, "fp32")(images(1))
    (graph,) = compiler.folder.glob("*.xml")
    if lost == "graph":
        graph.unlink()
    elif lost == "weights":
        graph.with_suffix(".bin").unlink()
    elif lost == "folder":
        openvino_files._remove(graph.parent)
    else:
        graph.write_bytes(b"")  # a machine that lost its power
    again = compiler.graph((3, 0), 1, "fp32")
    torch.testing.assert_close(again(images(1)), wanted, atol=1e-5, rtol=1e-5)
    assert graph.exists() and graph.with_suffix(".bin").exists()


@torch.inference_mode()
@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_shipped_translation_is_used_and_a_damaged_one_made_again(
    is_damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded()
    builder = compiler_of.Compiler(model.merged, (64, 64), 1, tmp_path / "image")
    wanted = builder.graph((3, 0), 1, "fp32")(images(1))
    (graph,) = builder.folder.glob("*.xml")
    if is_damaged:
        graph.write_bytes(b"")
    shipped = names(builder.folder)
    monkeypatch.setattr(openvino_files, "SHIPPED", tmp_path / "image")
    compiler = compiler_of.Compiler(model.merged, (64, 64), 1, tmp_path / "state")
    compiler.keep((3, 0))
    torch.testing.assert_close(compiler.graph((3, 0), 1, "fp32")(images(1)), wanted, atol=1e-5, rtol=1e-5)
    assert names(builder.folder) == shipped
    assert names(compiler.folder) == (shipped if is_damaged else set())
    assert {path.parent for path in compiler._files.kept} == {compiler.folder}


@torch.inference_mode()
def test_however_many_schedules_are_compiled_the_folder_holds_two_translations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded()
    compiler = compiler_of.Compiler(model.merged, (64, 64), 1, tmp_path)
    if compiler._operator is None:
        pytest.skip("without a C++ compiler each schedule has a translation of its own")
    translated: list[Any] = []
    translate = compiler_of.translate

    def noting(*args: Any) -> None:
        translated.append(args)
        translate(*args)

    monkeypatch.setattr(compiler_of, "translate", noting)
    for schedule in ((0, 0), (1, 0), (0, 2), (3, 3), (9, 1), (60, 0)):
        run = compiler.graph(schedule, 1, "fp32")
        torch.testing.assert_close(run(images(2)), model.merged(images(2), schedule), atol=1e-4, rtol=1e-4)
    assert len(translated) == 2
    assert {each.name for each in compiler.folder.iterdir()} == {"r0.xml", "r0.bin", "merging.xml", "merging.bin"}


@torch.inference_mode()
def test_a_graph_that_depends_on_its_schedule_otherwise_has_a_translation_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, schedule: Schedule) -> None:
        raise RuntimeError("the graph has 1 merging operators, and the model 2 blocks")

    monkeypatch.setattr(compiler_of, "set_schedule", refuse)
    model = loaded()
    compiler = compiler_of.Compiler(model.merged, (64, 64), 1, tmp_path)
    run = compiler.graph((3, 1), 1, "fp32")
    torch.testing.assert_close(run(images(1)), model.merged(images(1), (3, 1)), atol=1e-4, rtol=1e-4)
    assert (compiler.folder / "r3-1.xml").exists()


def test_a_translation_in_another_process_is_killed_by_the_end(tmp_path: Path) -> None:
    compiler = compiler_of.Compiler(loaded().merged, (64, 64), 1, tmp_path)
    failures: list[BaseException] = []

    def compile_aside() -> None:
        try:
            compiler.graph((3, 0), 1, "fp32", aside=True)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=compile_aside)
    thread.start()
    while compiler._process is None or compiler._process.pid is None:
        assert thread.is_alive()
        time.sleep(0.01)
    compiler.close()
    thread.join()
    assert "its translation ended with status -9" in str(failures)
    with pytest.raises(RuntimeError, match="the server ends"):
        compiler.graph((3, 0), 1, "fp32", aside=True)


def test_a_translation_in_another_process_ends_well(tmp_path: Path) -> None:
    compiler = compiler_of.Compiler(loaded().merged, (64, 64), 1, tmp_path)
    run = compiler.graph((3, 0), 1, "fp32", aside=True)
    assert run(images(2)).shape[0] == 2


def test_a_translation_outlives_sigterm_which_a_process_group_gets_before_the_server_has_answered_all(
    tmp_path: Path,
) -> None:
    process = translation.start()
    while not _ignores_sigterm(process.pid):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    merged = loaded().merged
    file = tmp_path / "merging.xml"
    assert translation.finish(process, pickle.dumps((merged, (3, 0), False, (64, 64), file, None))) == 0
    assert file.exists()


def _ignores_sigterm(pid: int) -> bool:
    (ignored,) = [
        line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:")
    ]
    return bool(int(ignored, 16) & 1 << signal.SIGTERM - 1)
