"""A training of a few steps: progress, resuming, ending in time, and the folder that is exported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from server.device.models import LoadedModel, load_model
from server.model_spec import ModelSpec
from tests.training.conftest import NAMES, STEPS, DataSet, said_by
from training import export, train
from training.augment import augment
from training.data import Split
from training.pace import learning_rate
from training.student import MODEL_ARGS

Train = Callable[..., list[str]]


@pytest.fixture(scope="module")
def trained(data: DataSet, teacher_weights: Path) -> Train:
    """Trains in a folder, `trained(run, *flags)`: batches of two; gives the lines that were printed."""

    def trained(run: Path, *flags: object) -> list[str]:
        arguments = ["--data", data.folder, "--run", run, "--teacher", teacher_weights, "--batch-size", 2]
        with pytest.MonkeyPatch.context() as patch:
            return said_by(patch, train.main, *arguments, *flags)

    return trained


def checkpoint(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "checkpoint.pt", weights_only=True)
    return state


class Run(NamedTuple):
    """A training of two epochs in two parts: what each part printed and left."""

    folder: Path
    first: list[str]
    second: list[str]
    after_first: dict[str, Any]
    after_second: dict[str, Any]


@pytest.fixture(scope="module")
def run(trained: Train, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first part ends for want of time; the second goes on."""
    folder = tmp_path_factory.mktemp("run") / "run"
    first = trained(folder, "--epochs", 2, "--stop-after-s", 1e-9)
    after_first = checkpoint(folder)
    second = trained(folder, "--epochs", 2)
    return Run(folder, first, second, after_first, checkpoint(folder))


class Exported(NamedTuple):
    """What the export printed and wrote, and the model that the server reads from it."""

    folder: Path
    said: list[str]
    loaded: LoadedModel


@pytest.fixture(scope="module")
def exported(run: Run, data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--data", data.folder, "--run", run.folder, "--out", folder, "--r", 4, 20]
        said = said_by(patch, export.main, *arguments)
    return Exported(folder, said, load_model(ModelSpec.model_validate({"source": f"local-dir:{folder}"})))


def test_training_tells_its_progress_and_goes_on_where_it_ended(run: Run) -> None:
    said = [re.sub(r"0\.\d{4}|loss .*", "", line) for line in (*run.first, *run.second)]
    first, second = ["epoch 1/2 ", "top-1 "], ["resumed after epoch 1", "epoch 2/2 ", "top-1 "]
    assert said == ["teacher top-1 ", *first, "teacher top-1 ", *second]
    for state, epochs in ((run.after_first, 1), (run.after_second, 2)):
        assert (state["epoch"], state["progress"]) == (epochs, epochs / 2)
        assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {epochs * STEPS}


def test_a_training_in_parts_ends_with_the_weights_of_an_unbroken_one(run: Run, trained: Train, tmp_path: Path) -> None:
    trained(tmp_path, "--epochs", 2)
    assert_same(checkpoint(tmp_path), run.after_second)


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_another_seed_trains_another_model(run: Run, trained: Train, tmp_path: Path) -> None:
    trained(tmp_path, "--epochs", 1, "--seed", 1)
    first, other = run.after_first["student"], checkpoint(tmp_path)["student"]
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_no_epoch_draws_what_another_drew(trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[torch.Tensor] = []

    def noted(images: torch.Tensor) -> torch.Tensor:
        fed.append(augment(images))
        return fed[-1]

    monkeypatch.setattr(train, "augment", noted)
    trained(tmp_path, "--epochs", 3, "--stop-after-s", 1e-9)
    learned = fed[-STEPS:]  # rehearsals come before
    trained(tmp_path, "--epochs", 3)
    learned += fed[-2 * STEPS :]
    assert len(torch.stack(learned).flatten(1).unique(dim=0)) == 3 * STEPS


def test_training_brings_the_student_nearer_to_its_teacher(trained: Train, tmp_path: Path) -> None:
    said = trained(tmp_path, "--epochs", 20, "--lr", 1e-2)
    losses = [float(line.split()[3]) for line in said if line.startswith("epoch")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_training_changes_every_weight_and_the_average_follows(run: Run) -> None:
    for which in ("student", "average"):
        before, after = run.after_first[which], run.after_second[which]
        unchanged = [name for name in before if torch.equal(before[name], after[name])]
        assert not unchanged, which
        assert all(value.isfinite().all() for value in after.values())


def test_training_a_finished_run_again_does_nothing(run: Run, trained: Train) -> None:
    before = (run.folder / "checkpoint.pt").read_bytes()
    assert trained(run.folder, "--epochs", 2)[1:] == ["resumed after epoch 2"]
    assert (run.folder / "checkpoint.pt").read_bytes() == before


class Watch:
    """A clock that goes on by a second whenever somebody looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far the training was at each step, as the learning rate was told; and every look at the clock is a second."""
    seen: list[float] = []

    def noted(progress: float, highest: float) -> float:
        seen.append(progress)
        return learning_rate(progress, highest)

    monkeypatch.setattr(train, "learning_rate", noted)
    monkeypatch.setattr(train, "time", Watch())
    return seen


def test_a_training_of_so_many_minutes_ends_in_time_and_annealed(
    trained: Train, tmp_path: Path, rates: list[float]
) -> None:
    said = trained(tmp_path, "--minutes", 8 / 60)
    # It begins at 2 s; the rehearsal tells of epochs of 0.6 s, the first epoch of 1 s.
    epochs = [line.split(" ")[1] for line in said if line.startswith("epoch")]
    assert epochs == ["1/10", "2/6", "3/6", "4/6", "5/6", "6/6"]
    assert said[-2].endswith(" 8 s")
    state = checkpoint(tmp_path)
    assert (state["epoch"], state["progress"]) == (6, 1)
    assert rates[:STEPS] == pytest.approx([0.1 * step / STEPS for step in range(STEPS)])
    even = [0.1 + 0.9 * step / (5 * STEPS) for step in range(5 * STEPS)]  # what was left, in five equal parts
    assert rates[STEPS:] == pytest.approx(even)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(learning_rate(even[-1], 1.5e-3))


def test_a_training_without_time_still_makes_one_epoch_from_warm_up_to_the_end(
    trained: Train, tmp_path: Path, rates: list[float]
) -> None:
    assert [line.split(" ")[1] for line in trained(tmp_path, "--minutes", 1e-3)][1] == "1/1"
    assert rates == pytest.approx([step / STEPS for step in range(STEPS)])
    assert checkpoint(tmp_path)["progress"] == 1


def test_a_resumed_training_is_as_long_as_it_is_now_told(trained: Train, tmp_path: Path, rates: list[float]) -> None:
    trained(tmp_path, "--epochs", 4, "--stop-after-s", 1)
    del rates[:]
    said = trained(tmp_path, "--minutes", 5 / 60)
    assert [line.split(" ")[1] for line in said if line.startswith("epoch")] == ["2/6", "3/4", "4/4"]
    assert rates[0] == 0.25 and checkpoint(tmp_path)["progress"] == 1
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", 3, "--processes", 2], "--batch-size is 3; it must be a multiple of the 2 processes"),
        (["--batch-size", 8], "--batch-size is 8; there are 6 images"),
        (["--processes", -1], "--processes is -1; it must be 1 or more"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(trained: Train, tmp_path: Path, flags: list[object], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        trained(tmp_path, *flags)


def test_a_loss_that_is_no_number_ends_the_training(
    trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "learning_rate", lambda progress, highest: float("nan"))
    with pytest.raises(SystemExit, match="the loss of epoch 1 is nan"):
        trained(tmp_path, "--epochs", 2)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_export_is_the_average_in_half_precision(run: Run, exported: Exported) -> None:
    weights, average = load_file(exported.folder / "model.safetensors"), run.after_second["average"]
    assert weights.keys() == average.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, average[name].half()), name


def test_the_server_reads_the_exported_folder(exported: Exported) -> None:
    info = exported.loaded.info
    assert info.labels == tuple(NAMES)
    assert (info.architecture, info.num_blocks, info.num_tokens) == ("vit_tiny_patch16_224", 2, 257)
    shown = info.preprocessing
    assert shown.input_size == shown.resize_size == (64, 64)
    assert shown.mean == shown.std == (0.5, 0.5, 0.5)


def test_the_export_ends_with_a_measurement_that_the_served_model_repeats(exported: Exported, data: DataSet) -> None:
    rows = json.loads(exported.said[-1])["rows"]
    assert [row["r"] for row in rows] == [0, 4, 20]
    assert [row["tokens"] for row in rows] == [257, 257 - 2 * 4, 257 - 2 * 20]
    x = data.val.images.float() / 127.5 - 1
    with torch.inference_mode():
        guesses = [exported.loaded.merged(x, row["r"]).argmax(1) for row in rows]
    for row, guess in zip(rows, guesses, strict=True):
        assert row["top1"] == pytest.approx((guess == data.val.labels).float().mean().item())
        assert row["agreement"] == pytest.approx((guess == guesses[0]).float().mean().item())


def test_top1_is_agreement_where_the_labels_are_the_answers_without_merging(small_models: None) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **MODEL_ARGS).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough that images differ in their answers
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    images = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        labels = model(images.float() / 127.5 - 1).argmax(1)
    assert len(labels.unique()) > 3
    labels[0] = (labels[0] + 1) % 200
    none, some, most = export.measure(model, Split(images, labels), [8, 20])
    assert none["agreement"] == 1 and none["top1"] == pytest.approx(23 / 24)
    for row in (some, most):
        assert abs(row["agreement"] - row["top1"]) <= 1 / 24 + 1e-6
    assert most["agreement"] < 1


def test_a_model_trained_before_can_be_the_start(trained: Train, tmp_path: Path) -> None:
    trained(tmp_path / "before", "--epochs", 1)
    before = checkpoint(tmp_path / "before")["average"]
    save_file(before, tmp_path / "before.safetensors")
    trained(tmp_path / "after", "--epochs", 1, "--lr", 0, "--start", tmp_path / "before.safetensors")
    for name, weight in checkpoint(tmp_path / "after")["average"].items():
        torch.testing.assert_close(weight, before[name])
