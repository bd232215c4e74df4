"""`tome-server tune` on a tiny model: what is written and where, what is refused, and that r=0 stays as it is."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from server.cli import main
from server.commands import tune
from server.device import tuned_file
from server.device.models import load_model
from server.model_spec import BUNDLED_NAME, ModelSpec
from server.tuning import FEWEST, learning, photos, session, unfinished
from server.tuning.judging import Gain, Judge
from tests.server.conftest import encode
from tests.server.model_folders import edit, noise_photos, random_vit
from tome_core.tuned import Tuned
from tome_core.tuning import Recipe, Tuner

COUNT, FEW, BAND = 250, 50, (20, 22)
STEPS = 30
SURE, UNSURE = (0.01, 0.2), (-0.01, 0.2)

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """SIGINT does what it does at a terminal. A shell without one starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_vit(tmp_path_factory.mktemp("models") / "tiny vit")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "tiny vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_photos(tmp_path_factory.mktemp("my photos"), COUNT)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CPU_RECIPE", Recipe(steps=STEPS, batch_size=32, learning_rate=5e-3))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[float, float]], None]:
    """Has the judging photos find a gain with this interval."""

    def judged(interval: tuple[float, float]) -> None:
        gain = Gain([20, 21, 22], [0.5] * 3, [0.6] * 3, sum(interval) / 2, interval)
        monkeypatch.setattr(Judge, "gain", lambda judge, ladder: gain)

    return judged


Judged = Callable[[tuple[float, float]], None]


def command(folder: Path, images: Path, *more: str) -> list[str]:
    plain = ["--model", f"local-dir:{folder}", "--images", str(images), "--device", "cpu", "--threads", "1"]
    return ["tune", *plain, "--band", f"{BAND[0]}..{BAND[1]}", "--state-dir", "none", "--limit", str(FEW), *more]


def told(printed: Printed) -> tuple[dict[str, Any], str]:
    """The last line, and what was told beside it."""
    shown = printed.readouterr()
    last: dict[str, Any] = json.loads(shown.out.splitlines()[-1])
    return last, shown.err


def classified(folder: Path, images: Path, r: int, printed: Printed) -> list[str]:
    """Full answers."""
    files = [str(images / f"{index}.png") for index in range(5)]
    plain = ["--model", f"local-dir:{folder}", "--device", "cpu"]
    assert main(["classify", *plain, "--json", "--top-k", "5", "--r", str(r), *files]) == 0
    return [json.dumps(json.loads(line)["top_k"]) for line in printed.readouterr().out.splitlines()]


def test_what_it_gains_is_written_beside_the_weights_and_found_there(
    folder: Path, images: Path, capsys: Printed
) -> None:
    asked = (0, BAND[0] - 1, BAND[0])
    before = {r: classified(folder, images, r, capsys) for r in asked}
    assert main(command(folder, images, "--limit", str(COUNT))) == 0
    said, beside = told(capsys)
    file = folder / "model.tuned.safetensors"
    assert said.pop("written") == str(file) and f"kept in {file}" in beside
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", "model.safetensors", file.name]

    tuned = Tuned.load(file)
    assert [(band.low, band.high) for band in tuned.bands] == [BAND] and tuned.about == said
    assert said["photos"].items() >= {"learned": 150, "judges": 100}.items() and said["recipe"]["batch_size"] == 32
    mean, low, high = said["gain"]
    rows = said["agreement"]
    assert 0 < low < mean < high and [row["r"] for row in rows] == [20, 21, 22]
    assert sum(row["after"] - row["before"] for row in rows) / 3 == pytest.approx(mean, abs=1e-3)

    loaded = load_model(ModelSpec.model_validate(f"local-dir:{folder}"))
    assert loaded.info.tuned == (BAND,) and loaded.tuned_file == file
    after = {r: classified(folder, images, r, capsys) for r in asked}
    assert after[0] == before[0] and after[BAND[0] - 1] == before[BAND[0] - 1] and after[BAND[0]] != before[BAND[0]]


def test_what_it_says_of_the_photos_holds_for_the_model_that_is_served(
    folder: Path, images: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gain, "is_sure", True)
    assert main(command(folder, images)) == 0
    said, _ = told(capsys)
    loaded = load_model(ModelSpec.model_validate(f"local-dir:{folder}"))
    assert loaded.info.tuned == (BAND,)
    taken = photos.read(images, FEW, loaded.info, 10_000)
    pixels = photos.normalised(taken.judges.float() / 255, loaded.info.preprocessing)
    for when in ("after", "before"):
        for row in said["agreement"]:
            with torch.inference_mode():
                kept = loaded.merged(pixels, row["r"]).argmax(dim=1) == loaded.merged(pixels, 0).argmax(dim=1)
            assert float(kept.float().mean()) == pytest.approx(row[when], abs=1e-4)
        loaded.merged.take_tuned(None)
    assert any(row["before"] != row["after"] for row in said["agreement"])


def test_the_table_and_the_progress(folder: Path, images: Path, judged: Judged, capsys: Printed) -> None:
    judged(SURE)
    assert main(command(folder, images)) == 0
    shown = capsys.readouterr()
    head, *rows, last = shown.out.splitlines()
    assert head.split() == ["r", "agree", "%,", "before", "tuned", "gain"]
    assert [row.split() for row in rows] == [[str(r), "50.0", "60.0", "+10.0"] for r in (20, 21, 22)]
    lines = [line for line in shown.err.splitlines() if line.startswith("[")]
    assert 1 < len(lines) <= learning.GLANCES and "\r" not in shown.err
    assert "loss" in lines[0] and "at r=21" in lines[0]
    assert "gains +10.5 points (+1.0 to +20.0)" in shown.err and "run tome-server calibrate" in shown.err
    assert json.loads(last)["gain"] == [0.105, 0.01, 0.2]


def test_nothing_is_written_where_no_gain_is_sure(folder: Path, images: Path, judged: Judged, capsys: Printed) -> None:
    judged(UNSURE)
    output = folder / "mine.safetensors"
    before = sorted(folder.iterdir())
    for more in ([], ["-o", str(output)]):
        assert main(command(folder, images, *more)) == 0
        said, beside = told(capsys)
        assert said["written"] is None and "not beyond its interval, so nothing is written" in beside
        assert sorted(folder.iterdir()) == before


def test_photos_of_one_colour_give_nothing(folder: Path, tmp_path: Path, capsys: Printed) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index in range(FEWEST):
        (flat / f"{index}.png").write_bytes(encode(Image.new("L", (40, 40), 128)))
    assert main(command(folder, flat)) == 0
    assert told(capsys)[0]["written"] is None


def test_one_block_whose_merging_nothing_reads_gives_nothing(images: Path, tmp_path: Path, capsys: Printed) -> None:
    folder = random_vit(tmp_path / "one block", num_classes=5, depth=1, global_pool="token")
    plain = ["--images", str(images), "--limit", str(FEW), "--device", "cpu", "--state-dir", "none"]
    assert main(["tune", "--model", f"local-dir:{folder}", *plain]) == 0
    said, beside = told(capsys)
    (row,) = said["agreement"]
    assert said["written"] is None and (row["r"], row["before"]) == (32, 1.0)
    assert "at r=32..32" in beside and "loss 0.000" in beside


def test_a_file_that_is_named_is_written(
    folder: Path, images: Path, judged: Judged, capsys: Printed, tmp_path: Path
) -> None:
    judged(SURE)
    output = tmp_path / "my numbers.safetensors"
    assert main(command(folder, images, "-o", str(output))) == 0
    said, beside = told(capsys)
    assert said["written"] == str(output) and f"--tuned '{output}'" in beside
    assert not (folder / "model.tuned.safetensors").exists()
    spec = ModelSpec.model_validate({"source": f"local-dir:{folder}", "tuned": str(output)})
    assert load_model(spec).info.tuned == (BAND,)


def test_a_file_of_tuned_numbers_that_is_named_is_replaced_and_a_pipe_is_not_opened(
    folder: Path, images: Path, judged: Judged, capsys: Printed, tmp_path: Path
) -> None:
    judged(SURE)
    output, pipe = tmp_path / "numbers", tmp_path / "pipe"
    for band in ("20..22", "21..22"):
        assert main(command(folder, images, "-o", str(output), "--band", band)) == 0
    (kept,) = Tuned.load(output).bands
    assert (kept.low, kept.high) == (21, 22)
    os.mkfifo(pipe)
    assert main(command(folder, images, "-o", str(pipe))) == 2
    assert f"-o is {pipe}, which holds no tuned numbers" in capsys.readouterr().err and pipe.is_fifo()


def test_where_the_weights_lie_in_a_folder_that_cannot_be_written_the_state_folder_is_taken(
    folder: Path, images: Path, judged: Judged, capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(SURE)
    save = Tuned.save

    def refused(tuned: Tuned, file: Path) -> None:
        if file.parent == folder:
            raise PermissionError(13, "Permission denied")
        save(tuned, file)

    can_be_written = tuned_file.can_be_written
    monkeypatch.setattr(tuned_file, "can_be_written", lambda file: file.parent != folder and can_be_written(file))
    monkeypatch.setattr(Tuned, "save", refused)
    state = tmp_path / "state"
    assert main(command(folder, images, "--state-dir", str(state))) == 0
    said, beside = told(capsys)
    (kept,) = (state / "tuned").iterdir()
    assert said["written"] == str(kept) and "model.tuned.safetensors cannot be written (Permission denied)" in beside
    assert load_model(ModelSpec.model_validate(f"local-dir:{folder}"), state).tuned_file == kept


def test_the_bundled_model_is_tuned_in_the_state_folder(
    images: Path, judged: Judged, capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(SURE)
    monkeypatch.setattr(session, "CPU_RECIPE", Recipe(steps=1, batch_size=2))
    plain = ["--images", str(images), "--device", "cpu", "--band", "12..14", "--limit", "50"]
    assert main(["tune", *plain, "--state-dir", "none"]) == 2
    assert (
        f"{BUNDLED_NAME} has no folder of its own, and there is no state folder; use -o FILE" in capsys.readouterr().err
    )
    assert main(["tune", *plain, "--state-dir", str(tmp_path)]) == 0
    (kept,) = (tmp_path / "tuned").iterdir()
    assert told(capsys)[0]["written"] == str(kept)
    assert load_model(ModelSpec.model_validate("bundled"), tmp_path).info.tuned == ((12, 14),)


def receive(number: signal.Signals) -> None:
    """Does what Python does on a signal. tests/e2e/test_tune.py sends real ones, to a process of its own."""
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Lets a signal arrive in a step, counted from 1."""

    def stopping(at: int, number: signal.Signals) -> None:
        step, steps = Tuner.step, iter(range(1, 1000))

        def signalled(tuner: Tuner, *args: Any) -> Any:
            if next(steps) == at:
                receive(number)
            return step(tuner, *args)

        monkeypatch.setattr(Tuner, "step", signalled)

    return stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_was_learned_and_the_same_command_goes_on(
    folder: Path,
    images: Path,
    judged: Judged,
    number: signal.Signals,
    stopping: Callable[..., None],
    capsys: Printed,
) -> None:
    judged(SURE)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopping(5, number)
    assert main(command(folder, images)) == 0
    said, beside = told(capsys)
    assert said["steps"] == 5 and said["written"]
    assert "stopping after this step" in beside and "stopped; the same command goes on from here" in beside
    assert (folder / "model.tuned.safetensors.unfinished").is_file()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    stopping(1000, number)
    assert main(command(folder, images)) == 0
    said, beside = told(capsys)
    assert "going on after step 5" in beside and said["steps"] > 5
    assert not (folder / "model.tuned.safetensors.unfinished").exists()


def test_after_a_stop_the_numbers_are_those_of_a_learning_that_was_not_stopped(
    folder: Path, images: Path, judged: Judged, stopping: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(SURE)
    step, seen = Tuner.step, []

    def noted(tuner: Tuner, *args: Any) -> Any:
        seen.append(tuner.numbers())
        return step(tuner, *args)

    monkeypatch.setattr(Tuner, "step", noted)
    monkeypatch.setattr(learning, "PATIENCE", STEPS)
    assert main(command(folder, images)) == 0
    whole = seen.copy()
    seen.clear()
    stopping(5, signal.SIGINT)
    assert main(command(folder, images)) == 0
    assert len(seen) == 5
    monkeypatch.setattr(Tuner, "step", noted)
    assert main(command(folder, images)) == 0
    assert len(whole) == len(seen) == STEPS
    for numbers, others in zip(whole, seen, strict=True):
        assert all(torch.equal(number, others[name]) for name, number in numbers.items())


@pytest.mark.parametrize(
    ("more", "recipe"), [(["--limit", "60"], {}), (["--band", "19..22"], {}), ([], {"batch_size": 16})]
)
def test_another_learning_begins_anew(
    folder: Path,
    images: Path,
    more: list[str],
    recipe: dict[str, int],
    judged: Judged,
    stopping: Callable[..., None],
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged(SURE)
    stopping(2, signal.SIGINT)
    assert main(command(folder, images)) == 0
    monkeypatch.setattr(session, "CPU_RECIPE", replace(session.CPU_RECIPE, **recipe))
    stopping(1, signal.SIGINT)
    assert main(command(folder, images, *more)) == 0
    said, beside = told(capsys)
    assert said["steps"] == 1 and "going on" not in beside


def test_it_is_told_where_a_stop_cannot_be_taken_up(
    folder: Path,
    images: Path,
    judged: Judged,
    stopping: Callable[..., None],
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    judged(SURE)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unfinished, "keep", full)
    stopping(5, signal.SIGINT)
    with caplog.at_level(logging.WARNING):
        assert main(command(folder, images)) == 0
    assert caplog.text.count("a stopped tuning cannot be resumed") == 1 and "No space left" in caplog.text
    assert told(capsys)[1].rstrip().endswith("stopped")


@pytest.mark.parametrize("where", ["read", "Session"])
def test_ctrl_c_ends_it_at_once_while_nothing_is_learned(
    folder: Path, images: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = photos if where == "read" else session

    def interrupted(*args: object) -> None:
        receive(signal.SIGINT)

    monkeypatch.setattr(module, where, interrupted)
    assert main(command(folder, images)) == 128 + signal.SIGINT


def test_a_second_ctrl_c_ends_it_as_ever(folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*args: object) -> None:
        receive(signal.SIGINT)
        receive(signal.SIGINT)

    monkeypatch.setattr(Tuner, "step", twice)
    assert main(command(folder, images)) == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_classes": 0}, "has no classifier"),
        ({"problem_type": "multi_label_classification"}, "is a multi-label model"),
    ],
)
def test_a_model_whose_answer_is_not_one_class_is_refused(
    change: dict[str, Any], named: str, images: Path, tmp_path: Path, capsys: Printed
) -> None:
    folder = random_vit(tmp_path / "other", change.get("num_classes", 50))
    edit(folder, lambda config: config.update(change))
    assert main(command(folder, images)) == 2
    assert named in capsys.readouterr().err


def test_a_model_that_gives_no_numbers_is_said(
    folder: Path, images: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuner, "step", lambda *args: torch.tensor(float("nan")))
    assert main(command(folder, images)) == 1
    assert "tome-server: the loss is nan near step 2: this model cannot be tuned" in capsys.readouterr().err


def test_a_person_who_looks_on_sees_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    tell = tune._line((12, 18))
    tell(learning.Progress(step=1, seconds=30.0), 0.25)
    tell(learning.Progress(step=2, seconds=60.0, glances=1, agreement=0.925, loss=0.5), 0.5)
    _, first, second = capsys.readouterr().err.split("\r")
    assert first.rstrip() == f"[{'#' * 6:<24}]  25%  1:30 left"
    assert second.rstrip() == f"[{'#' * 12:<24}]  50%  loss 0.500, agreement 92.5% at r=15, 1:00 left"
    assert "\n" not in first + second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--band", "fast"], "--band is 'fast'; it must be LOW..HIGH, between 1 and 32"),
        (["--band", "5..40"], "between 1 and 32"),
        (["--band", ""], "--band is ''; it must be LOW..HIGH"),
        (["--minutes", "0"], "--minutes is 0; it must be above 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "-1"], "--minutes is -1"),
        (["--limit", "49"], "--limit is 49; it must be 50 or more"),
        (["--limit", "-1"], "--limit is -1"),
        (["--images", "nowhere"], "nowhere holds 0 images; at least 50"),
        (["-o", "nowhere/numbers"], "-o is nowhere/numbers: there is no folder nowhere"),
        (["-o", "."], "-o is ., which is a folder"),
        (["-o", "x" * 250], "xxx cannot be written; use -o FILE"),
        (["-o", "x" * 300], "xxx cannot be written; use -o FILE"),
        (["-o", "model.safetensors"], "-o is model.safetensors, which holds no tuned numbers; it is not overwritten"),
        (["-o", "config.json"], "-o is config.json, which holds no tuned numbers"),
        (["--weights", "random"], "tiny-vit has random weights"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_learned(
    arguments: list[str], said: str, folder: Path, images: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Tuner, "step", None)
    assert main(command(folder, images, *arguments)) == 2
    error = capsys.readouterr().err
    assert said in error and error.splitlines()[-1].startswith("tome-server: ")
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_place_that_cannot_be_written_is_said_before_anything_is_learned(
    images: Path, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file lies where the folder should: not even root can write there."""
    monkeypatch.setattr(Tuner, "step", None)
    (tmp_path / "tuned").write_text("")
    plain = ["--images", str(images), "--device", "cpu", "--state-dir", str(tmp_path), "--limit", "50"]
    assert main(["tune", *plain]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "tuned" / BUNDLED_NAME) in error and "cannot be written; use -o FILE" in error
