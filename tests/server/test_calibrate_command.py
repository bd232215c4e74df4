"""`tome-server calibrate` on a tiny model, and the engine that goes by what it measured."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from server import loader
from server.batching.engine import LocalEngine
from server.calibration import speeds
from server.calibration.background import Ladder
from server.cli import main
from server.commands import progress
from server.commands.progress import Bar
from server.curve import Curve, Facts
from server.device import models
from server.device.models import LoadedModel
from server.engine_process import build_engine
from server.errors import NotFoundError
from server.settings import Settings
from tests.server.conftest import encode

COUNT = 10


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, for a curve to lie in."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny-vit"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of noise, one in a folder below, and a table that lists all but two of them."""
    images = tmp_path / "photos"
    (images / "below").mkdir(parents=True)
    torch.manual_seed(0)
    names = [f"below/{index}.png" if index == 0 else f"{index}.png" for index in range(COUNT)]
    for name in names:
        noise = Image.frombytes("RGB", (8, 8), bytes(torch.randint(256, (8 * 8 * 3,)).tolist()))
        (images / name).write_bytes(encode(noise.resize((40, 36))))
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{name},{1}\n" for name in names[:-2]))
    return images


def command(folder: Path, photos: Path, *more: str) -> list[str]:
    plain = ["--device", "cpu", "--backend", "torch", "--threads", "1", "--max-batch-size", "4", "--state-dir", "none"]
    return ["calibrate", "--model", f"local-dir:{folder}", "--images", str(photos), *plain, *more]


def engine(folder: Path) -> LocalEngine:
    said = {"model": f"local-dir:{folder}", "device": "cpu", "backend": "torch", "max_batch_size": 4, "state_dir": None}
    return build_engine(Settings.model_validate(said))


def test_it_measures_a_ladder_and_keeps_it_beside_the_model(
    folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = str(photos.parent / "labels.csv")
    assert main(command(folder, photos, "--r", "4", "8", "8,2", "--labels", labels)) == 0
    shown = capsys.readouterr()
    curve = Curve.from_json((folder / "curve.json").read_bytes())
    assert Curve.from_json(shown.out.splitlines()[-1]) == curve
    assert [row.r for row in curve.rows] == [(0, 0), (4, 4), (8, 8), (8, 2)]
    assert [row.tokens for row in curve.rows] == [17, 9, 5, 7]
    assert (curve.model, curve.photos, curve.max_batch_size) == ("tiny-vit", COUNT, 4)
    assert (curve.facts.precision, curve.facts.backend, curve.facts.threads) == ("fp32", "torch", 1)
    for row in curve.rows:
        assert row.agreement * COUNT == pytest.approx(round(row.agreement * COUNT))
        assert row.top1 is not None and row.top1 * 8 == pytest.approx(round(row.top1 * 8))
        assert row.agreement_interval[0] <= row.agreement <= row.agreement_interval[1]
        assert row.line is not None and row.images_per_s is not None and row.gflops is not None
    costs = [row.gflops or 0.0 for row in curve.rows]
    assert costs[0] > costs[1] > costs[2] and curve.rows[0].agreement == 1
    table = shown.out.splitlines()
    assert len(table) == 2 + 4 + 1 and table[-2].split()[-1] == "8,2"
    assert "kept in" in shown.err and "\r" not in shown.err  # no line changes where nobody watches


def test_answers_are_those_that_classify_gives(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(str(file) for file in photos.rglob("*.png"))
    likeliest = {}
    for r in ("0", "8"):
        plain = ["--model", f"local-dir:{folder}", "--device", "cpu", "--json", "--r", r, "--top-k", "1"]
        assert main(["classify", *plain, *files]) == 0
        likeliest[r] = [json.loads(line)["top_k"][0]["index"] for line in capsys.readouterr().out.splitlines()]
    labels = photos.parent / "all.csv"
    rows = [f"{Path(file).relative_to(photos)},{index}" for file, index in zip(files, likeliest["8"], strict=True)]
    labels.write_text("\n".join(["file,label", *rows]))
    assert main(command(folder, photos, "--r", "8", "--labels", str(labels))) == 0
    unmerged, merged = Curve.from_json(capsys.readouterr().out.splitlines()[-1]).rows
    same = sum(one == other for one, other in zip(likeliest["0"], likeliest["8"], strict=True)) / COUNT
    assert merged.top1 == 1
    assert merged.agreement == unmerged.top1 == same


async def test_the_engine_goes_by_it(folder: Path, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(command(folder, photos, "--r", "4", "8", "-o", str(folder / "curve.json"))) == 0
    made = Curve.from_json((folder / "curve.json").read_bytes())
    threads = torch.get_num_threads()
    assert made.facts.threads == threads == 1
    with caplog.at_level(logging.INFO):
        served = await engine(folder).curve("tiny-vit")
    assert "timed now" not in caplog.text
    assert served.facts == served.speed_from.facts == made.facts
    assert [row.line for row in served.rows] == [row.line for row in made.rows]

    content = json.loads((folder / "curve.json").read_text())
    content["facts"]["device"] = "abacus"
    content["rows"][2]["overhead_s"] = 1000.0
    (folder / "curve.json").write_text(json.dumps(content))
    with caplog.at_level(logging.INFO):
        moved = await engine(folder).curve("tiny-vit")
    assert "made with device abacus" in caplog.text and "speeds are timed now" in caplog.text
    assert [row.agreement for row in moved.rows] == [row.agreement for row in made.rows]
    assert moved.facts.device == "abacus" and moved.speed_from.facts == made.facts
    assert (moved.rows[2].overhead_s or 0.0) < 1000


async def test_speeds_are_kept_for_the_weights_that_were_loaded_whatever_the_file_holds_by_then(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(folder, photos, "--r", "4", "-o", str(folder / "curve.json"))) == 0
    weights = Curve.from_json((folder / "curve.json").read_bytes()).facts.weights
    ladders: list[Any] = []
    kept: list[Facts] = []

    def made(*args: Any) -> Ladder:
        ladders.append(args)
        return Ladder(*args)

    monkeypatch.setattr(loader, "Ladder", made)
    monkeypatch.setattr(speeds, "keep", lambda name, curve, lines, facts, state_dir: kept.append(facts))
    engine(folder)
    (folder / "model.safetensors").write_bytes(b"other weights")
    ((*_, keep),) = ladders
    keep({})
    assert [facts.weights for facts in kept] == [weights]


async def test_the_ladder_of_auto_is_made_of_its_rows(folder: Path, photos: Path) -> None:
    assert main(command(folder, photos, "--r", "8,2")) == 0
    content = json.loads((folder / "curve.json").read_text())
    for row, speed, agreement in zip(content["rows"], (1.0, 0.5), (1.0, 0.875), strict=True):
        row.update(overhead_s=0.0, image_s=speed, agreement=agreement, agreement_interval=[agreement, agreement])
    (folder / "curve.json").write_text(json.dumps(content))
    auto = engine(folder)._served._served["tiny-vit"].dial
    assert [auto.expected_agreement(schedule) for schedule in ((0, 0), (8, 2), (4, 4))] == [1.0, 0.875, None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "ab" * 32}, "stale: made with other weights"),
        ({"precision": 16}, "cannot be used: it is no curve: facts.precision"),
    ],
)
async def test_a_curve_that_does_not_hold_is_said_and_not_used(
    change: dict[str, Any], said: str, folder: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(command(folder, photos, "--r", "4")) == 0
    content = json.loads((folder / "curve.json").read_text())
    content["facts"].update(change)
    (folder / "curve.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        started = engine(folder)
    assert said in caplog.text and "r=auto takes evenly spaced r" in caplog.text
    assert started._served._served["tiny-vit"].dial.expected_agreement((4, 4)) is None
    with pytest.raises(NotFoundError, match=f"tome-server calibrate --model local-dir:{folder}"):
        await started.curve("tiny-vit")


def test_it_draws(folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.svg"
    labels = str(photos.parent / "labels.csv")
    assert main(command(folder, photos, "--r", "4", "--labels", labels, "--plot", str(picture))) == 0
    assert "<svg" in picture.read_text()
    assert main(command(folder, photos, "--r", "4", "--plot", str(tmp_path / "curve.abc"))) == 2
    assert "curve.abc" in capsys.readouterr().err


def test_without_matplotlib_the_command_to_install_it_is_said(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(command(folder, photos, "--plot", "curve.svg")) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_person_who_watches_sees_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = Bar()
    bar(0.5, "half")
    bar(0.6, "too soon")
    bar(1.0, "all")
    half, whole = capsys.readouterr().err.split("\r")[1:]
    assert half.count("#") * 2 == whole.count("#") > 0 and "50%  half" in half
    assert "100%  all" in whole and whole.endswith("\n")


def test_it_says_what_it_does_from_the_first_second(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BETWEEN_S", 0)
    load_model, said_before = models.load_model, list[str]()

    def load(*arguments: Any) -> LoadedModel:
        said_before.append(capsys.readouterr().err)
        return load_model(*arguments)

    monkeypatch.setattr(models, "load_model", load)
    assert main(command(folder, photos, "--r", "4")) == 0
    assert said_before == ["loading tiny-vit\n"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"reading {COUNT} photos"
    assert "  0%  warming up r=0 (1 of 2)" in lines[1] and "  0%  warming up r=4 (2 of 2)" in lines[2]
    shares = [int(line[27:30]) for line in lines[1:-1]]
    assert shares == sorted(shares) and shares[-1] == 100


@pytest.mark.parametrize("arguments", [["-o", "nowhere/curve.json"], ["--plot", "nowhere/curve.svg"], ["--r", "fast"]])
def test_what_is_wrong_for_any_model_is_said_before_one_loads(
    arguments: list[str],
    folder: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("a model loads"))
    assert main(command(folder, photos, *arguments)) != 0
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--r", "fast"], "fast"),
        (["--r", "9"], "between 0 and 8"),
        (["--r", "1,1,1"], "3 blocks"),
        (["--limit", "1"], "--limit is 1"),
        (["--images", "nowhere"], "nowhere"),
        (["--labels", "nothing.csv"], "nothing.csv"),
        (["--labels", "columns.csv"], "columns file and label"),
        (["--labels", "classes.csv"], "the label '3' must be a number from 0 to 2"),
        (["--labels", "others.csv"], "lists none of the photos"),
        (["--weights", "random"], "random weights"),
        (["-o", "nowhere/curve.json"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str],
    named: str,
    folder: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("columns.csv").write_text("photo,class\n1.png,0\n")
    Path("classes.csv").write_text("file,label\n1.png,3\n")
    Path("others.csv").write_text("file,label\nmine.png,2\n")
    assert main(command(folder, photos, *arguments)) == 2
    assert named in capsys.readouterr().err
    assert not (folder / "curve.json").exists()


def test_only_a_curve_is_overwritten(folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, curve = folder / "model.safetensors", folder / "kept.json"
    before = weights.read_bytes()
    assert main(command(folder, photos, "-o", str(weights))) == 2
    assert f"-o is {weights}, which holds no curve; it is not overwritten" in capsys.readouterr().err
    assert weights.read_bytes() == before
    for _ in range(2):
        assert main(command(folder, photos, "-o", str(curve))) == 0
    assert Curve.from_json(curve.read_bytes()).rows
