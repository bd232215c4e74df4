"""benchmarks.tuning on small random photos: folds that nobody learned from, and rows as the answers give them."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from benchmarks import tuning
from benchmarks.tuning import FOLDS, LADDER, Data, Judged, Variant, judged_fold, learned_names, rows
from server.device.models import LoadedModel, load_model
from server.model_spec import ModelSpec
from tests.server.model_folders import random_vit
from tome_core.tuning import Recipe

COUNT = 20
SHORT = Recipe(steps=2, batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = random_vit(tmp_path_factory.mktemp("models") / "tiny")
    return load_model(ModelSpec.model_validate(f"local-dir:{folder}"))


@pytest.fixture
def data() -> Data:
    """Photos each of one colour, their own number, to learn from."""
    squares = torch.arange(COUNT, dtype=torch.uint8).view(COUNT, 1, 1, 1).expand(COUNT, 3, 40, 40)
    return Data(squares, torch.randn(COUNT, 3, 32, 32), torch.randint(50, (COUNT,)), squares[:3] + 100)


def test_every_photo_is_judged_once_by_numbers_that_have_not_seen_it(
    loaded: LoadedModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    monkeypatch.setattr(
        tuning, "learn", lambda tuner, band, photos, *rest: seen.append(set(photos[:, 0, 0, 0].tolist()))
    )
    folds = {fold: judged_fold(Variant(recipe=SHORT, more=True), loaded, data, fold) for fold in range(FOLDS)}
    unseen = [set(range(COUNT)) - photos for photos in seen]
    assert sorted(photo for fold in unseen for photo in fold) == list(range(COUNT))
    assert all({100, 101, 102} < photos for photos in seen)
    for row in rows("product", folds):  # nothing was learned
        assert row["photos"] == COUNT and row["agreement"] == row["agreement_before"] and row["gain"][0] == 0
        assert row["nats"][0] == row["nats"][1]


def test_only_the_bands_are_tuned(loaded: LoadedModel, data: Data) -> None:
    _, found = judged_fold(Variant(((8, 11), (17, 18)), SHORT, learned="biases", photos=5), loaded, data, 0)
    assert list(found) == list(LADDER)
    assert all(found[0][0].agreed) and found[0][0].nats == 0
    assert [r for r, (before, after) in found.items() if before != after] == [8, 11, 17, 18]


def test_rows_are_shares_of_all_folds() -> None:
    before, after = Judged([True, False], [False, False], 0.5), Judged([True, True], [True, False], 0.25)
    row = rows("product", {fold: (1.0, dict.fromkeys(LADDER, (before, after))) for fold in range(FOLDS)})[0]
    assert (row["agreement_before"], row["agreement"], row["gain"][0]) == (50.0, 100.0, 50.0)
    assert (row["top1_before"], row["top1"], row["top1_gain"][0]) == (0.0, 50.0, 50.0)
    assert row["gain"][1] < 50 < row["gain"][2] and row["nats"] == [0.5, 0.25] and row["seconds"] == 1


@pytest.mark.parametrize("kind", ["norms and biases", "norms", "biases", "with tokens", "with head", "whole"])
def test_what_is_learned_is_of_the_model(loaded: LoadedModel, kind: str) -> None:
    names = learned_names(kind, loaded)
    assert set(names) <= {name for name, _ in loaded.merged.model.named_parameters()}
    assert ("head.bias" in names) is (kind == "with head") and len(names) == len(set(names))


def test_a_process_that_fails_says_that_it_has_ended(tmp_path: Path) -> None:
    args: Any = type("Args", (), {"model": "bundled", "weights": None, "data": tmp_path})
    done: SimpleQueue[object] = SimpleQueue()
    threads = torch.get_num_threads()
    with pytest.raises(FileNotFoundError):
        tuning._work(args, "cpu", SimpleQueue(), done, 0.0)
    torch.set_num_threads(threads)
    assert done.get_nowait() is None


def test_a_variant_that_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tuning", "--data", ".", "--variant", "product; magic"])
    with pytest.raises(SystemExit):
        tuning.main()
    assert "there is no variant 'magic'; there are: product; " in capsys.readouterr().err
