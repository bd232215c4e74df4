"""The benchmarks against answers computed without the server, over a few photos and a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tome_core
from benchmarks import accuracy, export, overload
from benchmarks.accuracy import share
from benchmarks.variants import CHOICES
from server.bench.load import Reply

SIDE, NUM_CLASSES, PHOTOS = 32, 10, 11
SIZE: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WRONG = 3  # photos whose label is not the model's answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ViT in the Hugging Face folder layout; its photos are fed as they are."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    folder.mkdir()
    torch.manual_seed(0)
    built = timm.create_model("vit_tiny_patch16_224", num_classes=NUM_CLASSES, **SIZE)
    for parameter in built.parameters():
        if parameter.ndim > 1:  # large enough that photos differ in their answers
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    save_file(built.state_dict(), folder / "model.safetensors")
    half = [0.5, 0.5, 0.5]
    fed = {"input_size": [3, SIDE, SIDE], "crop_pct": 1.0, "interpolation": "bicubic", "mean": half, "std": half}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": NUM_CLASSES,
        "model_args": SIZE,
        "pretrained_cfg": {**fed, "crop_mode": "center"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos") / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    files = [folder / f"{number}.jpg" for number in reversed(range(PHOTOS))]
    for file in files:
        pixels = torch.randint(256, (4, 4, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).resize((SIDE, SIDE)).save(file, quality=95)
    return files


@pytest.fixture(scope="module")
def data(model: Path, photos: list[Path]) -> Path:
    """The photos with the model's own answers as labels, but for the last few."""
    answers = answers_of(model, photos, 0)
    labels = answers[:-WRONG] + [(answer + 1) % NUM_CLASSES for answer in answers[-WRONG:]]
    lines = [f"{file.name},{label}" for file, label in zip(photos, labels, strict=True)]
    folder = photos[0].parent.parent
    (folder / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    return folder


def answers_of(model: Path, photos: Sequence[Path], r: int) -> list[int]:
    """The model's answers by its definition: no server, no batching."""
    built = timm.create_model("vit_tiny_patch16_224", num_classes=NUM_CLASSES, **SIZE).eval()
    built.load_state_dict(load_file(model / "model.safetensors"))
    merged, answers = tome_core.wrap(built), []
    for photo in photos:
        with Image.open(photo) as image:
            x = torch.tensor(list(image.convert("RGB").tobytes())).view(1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
        with torch.inference_mode():
            answers.append(int(merged(x / 127.5 - 1, r).argmax()))
    return answers


class Benchmark:
    """Runs the program on the CPU over the photos, with further arguments."""

    def __init__(
        self, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._fixed = ["--model", f"local-dir:{model}", "--data", str(data), "--device", "cpu", "--precision", "fp32"]
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> list[dict[str, Any]]:
        self._monkeypatch.setattr("sys.argv", ["accuracy", *self._fixed, *arguments])
        accuracy.main()
        last = json.loads(self._capsys.readouterr().out.splitlines()[-1])
        assert last["model"] == "tiny-vit"
        rows: list[dict[str, Any]] = last["rows"]
        return rows


@pytest.fixture
def benchmark(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Benchmark:
    return Benchmark(model, data, monkeypatch, capsys)


def test_the_last_line_holds_one_row_for_each_r_asked_for(benchmark: Benchmark) -> None:
    rows = benchmark("--r", "0", "2", "8")
    assert [row["r"] for row in rows] == [0, 2, 8]
    keys = {"method", "r", "top1", "agreement", "to_tome", "images", "tokens", "images_per_s"}
    assert all(row.keys() == keys for row in rows)
    assert [row["method"] for row in rows] == ["none", "tome", "tome"]
    assert all(row["images"] == PHOTOS and row["images_per_s"] > 0 for row in rows)
    assert [row["tokens"] for row in rows] == [17, 13, 5]  # two blocks merge; the second of r=8 has 9 tokens, merges 4


@pytest.mark.parametrize("batch_size", ["1", "3", "32"])
def test_top1_and_agreement_are_those_of_the_model_itself_at_every_batch_size(
    benchmark: Benchmark, model: Path, photos: list[Path], data: Path, batch_size: str
) -> None:
    labels = [int(line.split(",")[1]) for line in (data / "labels.csv").read_text().splitlines()[1:]]
    unmerged = answers_of(model, photos, 0)
    for row in benchmark("--r", "0", "4", "8", "--batch-size", batch_size):
        answers = answers_of(model, photos, row["r"])
        pairs = list(zip(answers, labels, unmerged, strict=True))
        assert row["top1"] == pytest.approx(sum(answer == label for answer, label, _ in pairs) / PHOTOS)
        assert row["agreement"] == pytest.approx(sum(answer == before for answer, _, before in pairs) / PHOTOS)


def test_without_merging_top1_is_the_share_of_labels_that_are_the_models_answers(
    benchmark: Benchmark, model: Path, photos: list[Path]
) -> None:
    assert len(set(answers_of(model, photos, 0))) > 2  # else the order of photos would not matter
    row, merged = benchmark("--r", "0", "8")
    assert row["agreement"] == 1
    assert row["top1"] == pytest.approx((PHOTOS - WRONG) / PHOTOS)
    assert merged["agreement"] < 1  # else merging might not have happened


def test_r_0_is_measured_first_though_it_is_not_asked_for(benchmark: Benchmark) -> None:
    asked, given = benchmark("--r", "0", "4"), benchmark("--r", "4")
    assert [row["r"] for row in given] == [0, 4]
    for key in ("top1", "agreement", "images", "tokens"):
        assert [row[key] for row in given] == [row[key] for row in asked]


def test_a_limit_takes_the_photos_that_are_listed_first(benchmark: Benchmark) -> None:
    (row,) = benchmark("--r", "0", "--limit", str(PHOTOS - WRONG))
    assert (row["images"], row["top1"]) == (PHOTOS - WRONG, 1)


def test_the_share_is_that_of_the_places_where_both_lists_agree() -> None:
    assert share([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert share([1, 2, 3, 4], [4, 3, 2, 1]) == 0
    assert share([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5
    assert share([5, 5, 5], [5, 0, 0]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError):
        share([1], [1, 2])


@pytest.mark.parametrize("batch_size", ["4", "32"])
def test_methods_are_compared_at_every_r_and_answer_alike_in_any_batch(benchmark: Benchmark, batch_size: str) -> None:
    rows = benchmark("--method", "prune-random,tome,prune-attention", "--r", "2", "8", "--batch-size", batch_size)
    methods = ["prune-random", "tome", "prune-attention"]
    assert [(row["method"], row["r"]) for row in rows] == [("none", 0)] + [(m, r) for r in (2, 8) for m in methods]
    assert [row["tokens"] for row in rows] == [17, 13, 13, 13, 5, 5, 5]
    top1 = {(row["method"], row["r"]): row["top1"] for row in rows}
    for row in rows:
        if row["method"] in ("none", "tome"):
            assert row["to_tome"] is None
        else:
            difference, low, high = row["to_tome"]
            assert difference == pytest.approx(row["top1"] - top1["tome", row["r"]])
            assert low < difference < high
    (alone,) = benchmark("--method", "prune-random", "--r", "8", "--batch-size", "11")[1:]
    assert (alone["top1"], alone["to_tome"]) == (top1["prune-random", 8], None)


def test_an_ablation_makes_each_choice_otherwise(benchmark: Benchmark) -> None:
    rows = benchmark("--ablate", "--r", "4")
    assert [row["method"] for row in rows] == ["none", "tome", *CHOICES]
    assert all(row["tokens"] == 9 for row in rows[1:])
    assert all(row["to_tome"] for row in rows[2:])


@pytest.mark.parametrize("what", [["--method", "tome,prune-attention,prune-random"], ["--ablate"]])
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_rows_are_drawn(benchmark: Benchmark, tmp_path: Path, what: list[str], suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"rows{suffix}"
    benchmark(*what, "--r", "2", "4", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_a_method_that_does_not_exist_is_refused(benchmark: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark("--method", "tome,prune")
    assert "no method 'prune'; there are: tome, prune-attention" in capsys.readouterr().err


def test_a_model_for_which_a_method_is_not_written_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "vit_pwee_patch16_reg1_gap_256", "--weights", "random", "--data", str(data)]
    monkeypatch.setattr("sys.argv", ["accuracy", *model, "--method", "prune-random"])
    with pytest.raises(SystemExit, match="PruneRandom is written for a VisionTransformer of plain blocks"):
        accuracy.main()


def test_the_export_benchmark_counts_the_same_answers_in_both_runtimes(
    model: Path,
    photos: list[Path],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = [int(line.split(",")[1]) for line in (data / "labels.csv").read_text().splitlines()[1:]]
    said = ["--model", f"local-dir:{model}", "--data", str(data), "--r", "0", "8", "--batch-sizes", "3"]
    monkeypatch.setattr("sys.argv", ["export", *said])
    export.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["r"], row["batch_size"], row["images"]) for row in rows] == [(0, 3, PHOTOS), (8, 3, PHOTOS)]
    for row in rows:
        top1 = share(answers_of(model, photos, row["r"]), labels)
        assert (row["same_top1"], row["top1_torch"], row["top1_onnx"]) == (PHOTOS, top1, top1)
        assert row["largest_difference"] < 1e-3
        assert min(row["images_per_s_torch"], row["images_per_s_onnx"]) > 0


def test_overload_is_judged_stretch_by_stretch() -> None:
    replies = [(at / 10, Reply(0, 200 if at % 2 else 429, 0.3 if at < 50 else 3.0, 0.0, None)) for at in range(100)]
    rows = overload.judge(replies, resident_mb=[float(n) for n in range(100)], seconds=10, deadline_s=1)
    assert [row["offered_per_s"] for row in rows] == [10] * 10
    assert [row["goodput_per_s"] for row in rows] == [5] * 5 + [0] * 5  # late is not good
    assert [row["p99_ms"] for row in rows] == [300] * 5 + [3000] * 5
    assert [row["resident_mb"] for row in rows] == [10 * part for part in range(10)]
