"""`tome-server run` on a tiny model: the answers of `classify`, each format, bad files, and going on after a stop."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from server.cli import main
from server.commands import progress
from server.errors import EngineError
from server.offline import unfinished
from server.offline.computing import Computing
from server.offline.model import Answer, Ask
from tests.server.conftest import encode
from tests.server.model_folders import edit, random_vit
from tome_core.whole_file import write_whole

COLOURS = [(200, 120, 10), (10, 20, 30), (250, 250, 250), (0, 200, 0), (90, 0, 180), (255, 0, 0), (3, 250, 200)]
LABELS = {"cat", "dog", "goldfish"}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Seven photos in `photos`, the folder of the working directory, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    files = []
    for index, colour in enumerate(COLOURS):
        folder = Path("photos", "more" if index > 4 else "")
        folder.mkdir(parents=True, exist_ok=True)
        name, form = (f"{index}.JPG", "JPEG") if index % 2 else (f"{index}.png", "PNG")
        image = Image.linear_gradient("L").resize((40 + index, 30)).convert("RGB")
        image = Image.blend(image, Image.new("RGB", image.size, colour), 0.6)
        (folder / name).write_bytes(encode(image, form))
        files.append(str(folder / name))
    Path("photos", "notes.txt").write_text("no photo")
    return files


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    """The flags of a tiny model that starts at once."""
    return ["--model", f"local-dir:{tiny_folder}", "--backend", "torch", "--device", "cpu", "--state-dir", "none"]


class Command:
    """Runs `tome-server run` and reads what it told."""

    def __init__(self, model: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
        self._model, self._capsys = model, capsys
        self.told = ""

    def __call__(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        """The last line; `told` is what else it said."""
        assert main(["run", *self._model, *arguments]) == status, self._capsys.readouterr().err
        captured = self._capsys.readouterr()
        self.told = captured.err
        assert "Traceback" not in self.told
        self.last_line = self.told.splitlines()[-1] if self.told else ""
        return dict(json.loads(captured.out.splitlines()[-1])) if status == 0 else {}


@pytest.fixture
def run(model: list[str], capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(model, capsys)


def lines(file: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def breaks_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device breaks after so many batches, once."""
    whole = Computing.answers

    def answers(self: Computing, ask: Ask, asked: Any) -> Iterator[list[Answer]]:
        monkeypatch.setattr(Computing, "answers", whole)
        for _, each in zip(range(batches), whole(self, ask, asked), strict=False):
            yield each
        raise EngineError("the device is broken")

    monkeypatch.setattr(Computing, "answers", answers)


def test_rows_are_what_classify_says(
    run: Command, model: list[str], photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = run("photos", "--r", "8,2", "--top-k", "3", "--max-batch-size", "3", "-o", "out.jsonl")
    assert (said["complete"], said["images"], said["errors"], said["earlier"]) == (True, 7, 0, 0)
    assert main(["classify", "--json", "--r", "8,2", "--top-k", "3", *model, *photos]) == 0
    classified = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = lines("out.jsonl")
    assert len({row["score"] for row in rows}) > 3, "the photos are too much alike to tell anything"
    for row, alone in zip(rows, classified, strict=True):
        named = row["top_k"][0]
        assert [row[each] for each in ("file", "model", "r", "tuned")] == [
            alone[each] for each in ("file", "model", "r", "tuned")
        ]
        assert [each["label"] for each in row["top_k"]] == [each["label"] for each in alone["top_k"]]
        assert [each["score"] for each in row["top_k"]] == pytest.approx([e["score"] for e in alone["top_k"]], rel=1e-4)
        assert (row["label"], row["index"], row["score"], row["error"]) == (*named.values(), None)
    assert not list(Path().glob("*.unfinished"))


@pytest.mark.parametrize("asked", [[], ["--top-k", "2"], ["--embed"]], ids=["label", "top_k", "vector"])
def test_each_format_holds_the_same_rows(asked: list[str], run: Command, photos: list[str]) -> None:
    Path("photos", "broken.png").write_bytes(Path(photos[0]).read_bytes()[:60])
    for suffix in ("jsonl", "csv", "parquet"):
        run("photos", "--r", "4", *asked, "-o", f"out.{suffix}")
    rows = lines("out.jsonl")
    assert len(rows) == 8 and [bool(row["error"]) for row in rows].count(True) == 1
    table = parquet.read_table("out.parquet").to_pylist()
    with open("out.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    for row, in_parquet, in_csv in zip(rows, table, cells, strict=True):
        assert list(row) == list(in_parquet) == list(in_csv)
        assert (in_parquet.pop("r"), in_csv.pop("r"), row.pop("r")) == ([4, 4], "4", 4)
        assert in_parquet == row
        for name, text in in_csv.items():
            assert row[name] == (
                text if name in ("file", "model", "label", "error") else json.loads(text or "null")
            ) or (row[name] is None and text == "")


def test_vectors_have_length_one_unless_asked_otherwise(run: Command, photos: list[str]) -> None:
    run("photos", "--embed", "-o", "unit.parquet")
    run("photos", "--embed", "--no-normalize", "-o", "plain.parquet")
    unit, plain = (
        np.array(parquet.read_table(file)["vector"].to_pylist()) for file in ("unit.parquet", "plain.parquet")
    )
    assert unit.shape == (7, 24)
    lengths = np.linalg.norm(plain, axis=1)
    assert np.linalg.norm(unit, axis=1) == pytest.approx(1, rel=1e-5) and abs(lengths - 1).min() > 0.1
    assert unit * lengths[:, None] == pytest.approx(plain, rel=1e-4, abs=1e-5)
    assert str(parquet.read_schema("unit.parquet").field("vector").type) == "list<element: float>"


def test_a_model_without_a_classifier_gives_vectors_alone(
    tmp_path: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_vit(tmp_path / "headless", num_classes=0)
    run = Command(["--model", f"local-dir:{folder}", "--backend", "torch", "--state-dir", "none"], capsys)
    assert run("photos", "--embed", "-o", "out.jsonl")["images"] == 7
    run("photos", "-o", "labels.jsonl", status=2)
    assert "has no classifier" in run.told and "--embed" in run.told


def test_a_list_names_files_from_the_working_directory(run: Command, photos: list[str], tmp_path: Path) -> None:
    Path("lists").mkdir()
    absolute = str(tmp_path / photos[5])
    Path("lists/mine.txt").write_text(f"{photos[3]}\r\n\n{absolute}\n{photos[0]}\n{photos[3]}\n{photos[1]}")
    assert run("lists/mine.txt", "-o", "out.jsonl")["images"] == 4
    assert [row["file"] for row in lines("out.jsonl")] == [photos[3], absolute, photos[0], photos[1]]


def test_a_bad_file_is_a_row_with_its_error(run: Command, photos: list[str]) -> None:
    os.mkfifo("pipe.png")
    Path("cut.jpg").write_bytes(Path(photos[1]).read_bytes()[:200])
    odd = b"caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(Path(photos[0]).read_bytes())
    bad = {"missing.png": "No such file", "pipe.png": "not a file", "photos": "not a file", "cut.jpg": "decoded"}
    Path("list.txt").write_bytes(b"\n".join([*map(str.encode, bad), odd, *map(str.encode, photos)]))
    said = run("list.txt", "--max-batch-size", "2", "-o", "out.parquet")
    assert (said["images"], said["errors"]) == (12, 4)
    rows = parquet.read_table("out.parquet").to_pylist()
    for row, (name, told) in zip(rows, bad.items(), strict=False):
        assert row["file"] == name and told in row["error"] and row["label"] is None and row["score"] is None
    assert rows[4]["file"] == "caf\\xe9.png"
    assert all(row["error"] is None and row["label"] in LABELS for row in rows[4:])


def test_sigmoid_names_each_label_over_a_threshold(run: Command, photos: list[str]) -> None:
    run("photos", "--function-to-apply", "none", "--top-k", "3", "-o", "logits.jsonl")
    logits = [{each["label"]: each["score"] for each in row["top_k"]} for row in lines("logits.jsonl")]
    scores = [{label: 1 / (1 + np.exp(-logit)) for label, logit in row.items()} for row in logits]
    bar = float(np.median([score for row in scores for score in row.values()]))
    run("photos", "--function-to-apply", "sigmoid", "--threshold", str(bar + 1e-6), "-o", "out.jsonl")
    for row, wanted in zip(lines("out.jsonl"), scores, strict=True):
        named = {each["label"]: each["score"] for each in row["top_k"]}
        assert named == pytest.approx({label: score for label, score in wanted.items() if score > bar + 1e-6}, rel=1e-4)
        assert row["label"] == next(iter(named), None)
    run("photos", "--function-to-apply", "sigmoid", "--threshold", "1", "-o", "nothing.parquet")
    row = parquet.read_table("nothing.parquet").to_pylist()[0]
    assert (row["label"], row["top_k"], row["error"]) == (None, [], None)


def test_a_multi_label_model_says_so_itself(
    tmp_path: Path, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_vit(tmp_path / "labels", num_classes=4)
    edit(folder, lambda config: config.update(problem_type="multi_label_classification"))
    run = Command(["--model", f"local-dir:{folder}", "--backend", "torch", "--state-dir", "none"], capsys)
    run("photos", "--threshold", "0.000001", "-o", "out.jsonl")
    assert all(len(row["top_k"]) == 4 for row in lines("out.jsonl"))


def test_the_same_command_goes_on_where_the_last_one_ended(
    run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["photos", "--max-batch-size", "2", "-o", "out.csv"]
    breaks_after(2, monkeypatch)
    run(*command, status=1)
    assert "the device is broken" in run.told and not Path("out.csv").exists()
    said = run(*command)
    assert (said["complete"], said["images"], said["earlier"]) == (True, 3, 4) and "4 of 7" in run.told
    with open("out.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == photos
    assert not Path("out.csv.unfinished").exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [(["--r", "4"], '--r "0"'), (["--top-k", "2"], "top_k 1"), (["--embed"], "--embed false")],
)
def test_other_settings_do_not_go_on_with_it(
    other: list[str], named: str, run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["photos", "--max-batch-size", "2", "-o", "out.jsonl"]
    breaks_after(1, monkeypatch)
    run(*command, status=1)
    run(*command, *other, status=2)
    assert named in run.last_line and "--overwrite" in run.last_line
    assert run(*command, *other, "--overwrite")["images"] == 7


def test_other_classes_of_the_same_weights_do_not_go_on_with_it(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_vit(tmp_path / "mine", num_classes=3)
    run = Command(["--model", f"local-dir:{folder}", "--backend", "torch", "--state-dir", "none"], capsys)
    arguments = ("photos", "-o", "out.jsonl", "--max-batch-size", "2")
    breaks_after(2, monkeypatch)
    run(*arguments, status=1)
    edit(folder, lambda config: config.update(label_names=["a", "b", "c"]))
    run(*arguments, status=2)
    assert "was begun with sha256 of classes and preprocessing" in run.told
    run(*arguments, "--overwrite")
    assert {row["label"] for row in lines("out.jsonl")} <= {"a", "b", "c"}


def test_two_runs_do_not_write_one_table(run: Command, photos: list[str]) -> None:
    Path("out.jsonl.unfinished").mkdir()
    held = os.open("out.jsonl.unfinished", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    run("photos", "-o", "out.jsonl", status=2)
    assert "another process writes" in run.told
    os.close(held)
    run("photos", "-o", "out.jsonl")


def test_an_unfinished_folder_that_is_damaged_is_told_of(run: Command, photos: list[str]) -> None:
    Path("out.jsonl.unfinished").mkdir()
    Path("out.jsonl.unfinished/about.json").write_text("[")
    run("photos", "-o", "out.jsonl", status=2)
    assert "out.jsonl.unfinished cannot be read" in run.told and "remove it" in run.told
    Path("out.jsonl.unfinished/about.json").write_text("5")
    run("photos", "-o", "out.jsonl", status=2)
    assert "out.jsonl.unfinished cannot be read" in run.told
    Path("out.csv.unfinished").mkdir()
    Path("out.csv.unfinished/00000001.csv").write_text("no\ntable\n")
    run("photos", "-o", "out.csv", status=2)
    assert "out.csv.unfinished cannot be read" in run.told


@pytest.mark.parametrize("name", ["a\rb.png", "a\nb.png", 'a",b.png', "a\r\nb.png"])
def test_a_name_with_the_end_of_a_line_stays_one_row_of_csv(
    name: str, run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("photos", name).write_bytes(Path(photos[0]).read_bytes())
    arguments = ("photos", "-o", "out.csv", "--max-batch-size", "2")
    breaks_after(3, monkeypatch)
    run(*arguments, status=1)
    run(*arguments)
    assert "going on: 6 of 8 images" in run.told
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["file"] for row in rows) == sorted([*photos, f"photos/{name}"])


def test_a_table_is_replaced_only_when_asked_and_another_file_never(run: Command, photos: list[str]) -> None:
    for suffix in ("jsonl", "csv", "parquet"):
        run("photos", "-o", f"out.{suffix}")
        run("photos", "-o", f"out.{suffix}", status=2)
        assert "is there already" in run.told
        run("photos", "--r", "8", "-o", f"out.{suffix}", "--overwrite")
        other = Path(f"other.{suffix}")
        other.write_text("file,class\nmine,3\n")
        run("photos", "-o", str(other), "--overwrite", status=2)
        assert "holds no table of this command" in run.told and other.read_text().startswith("file,class")
    assert {row["r"] for row in lines("out.jsonl")} == {8}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["photos", "-o", "out.txt"], ".parquet, .jsonl or .csv"),
        (["photos", "-o", "nowhere/out.csv"], "there is no folder nowhere"),
        (["nothing", "-o", "out.csv"], "nothing: No such file"),
        (["empty", "-o", "out.csv"], "empty holds no images"),
        (["photos/0.png", "-o", "out.csv"], "neither a folder nor a text file"),
        (["photos", "-o", "out.csv", "--top-k", "4"], "between 1 and 3"),
        (["photos", "-o", "out.csv", "--r", "9"], "between 0 and 8"),
        (["photos", "-o", "out.csv", "--r", "auto"], "--r is auto"),
        (["photos", "-o", "out.csv", "--threshold", "0.5"], "function_to_apply=sigmoid, not with softmax"),
        (["photos", "-o", "out.csv", "--function-to-apply", "sigmoid", "--threshold", "2"], "between 0 and 1"),
        (["photos", "-o", "out.csv", "--threshold", "0.5", "--top-k", "2"], "give one of them"),
        (["photos", "-o", "out.csv", "--embed", "--top-k", "2"], "--top-k goes without --embed"),
        (["photos", "-o", "out.csv", "--no-normalize"], "goes with --embed"),
        (["photos", "-o", "out.csv", "--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    arguments: list[str], named: str, run: Command, photos: list[str]
) -> None:
    Path("empty").mkdir()
    run(*arguments, status=2)
    assert run.last_line.startswith("tome-server: ") and named in run.last_line
    assert not Path("out.csv").exists()


def test_parquet_without_pyarrow_names_the_extra(
    run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run("photos", "-o", "out.parquet", status=2)
    assert "pip install 'tome-server[parquet]'" in run.told


def test_a_device_that_decodes_gets_files_as_they_came(run: Command, photos: list[str]) -> None:
    Path("photos", "cut.jpg").write_bytes(Path(photos[1]).read_bytes()[:200])
    run("photos", "-o", "pillow.jsonl")
    run("photos", "--decode", "device", "-o", "device.jsonl")
    for row, by_pillow in zip(lines("device.jsonl"), lines("pillow.jsonl"), strict=True):
        assert (row["file"], row["label"], row["error"]) == (by_pillow["file"], by_pillow["label"], by_pillow["error"])


def test_an_image_on_which_the_model_fails_is_a_row(
    run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.device.runner import Runner

    forward = Runner.forward

    def fails(self: Runner, key: Any, prepared: Any) -> Any:
        if any(each.item.image.data[0] > 140 for each in prepared):
            raise RuntimeError("too bright")
        return forward(self, key, prepared)

    monkeypatch.setattr(Runner, "forward", fails)
    said = run("photos", "-o", "out.jsonl")
    errors = [row["error"] for row in lines("out.jsonl") if row["error"]]
    assert 0 < len(errors) == said["errors"] < 7 and all("too bright" in error for error in errors)


def test_a_model_that_fails_on_all_images_ends_the_run(
    run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr("server.device.runner.Runner.forward", fails)
    run("photos", "-o", "out.jsonl", status=1)
    assert "out of order" in run.told and not Path("out.jsonl").exists()


def test_progress_is_a_line_now_and_then(run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BETWEEN_S", 0)
    run("photos", "--max-batch-size", "2", "-o", "out.jsonl")
    loading, *told = run.told.splitlines()
    assert loading == "loading tiny-vit"
    assert [line[27:31].strip() for line in told] == ["29%", "57%", "86%", "100%"]
    assert "2 of 7 images, " in told[0] and told[0].endswith(" left") and "images/s" in told[0]
    assert [progress.clock(seconds) for seconds in (9.9, 754, 3723)] == ["0:09", "12:34", "1:02:03"]


@pytest.mark.slow
def test_several_devices_fill_one_table(run: Command, photos: list[str]) -> None:
    same = ("photos", "--max-batch-size", "2", "--threads", "1")  # another count of threads rounds in another order
    run(*same, "-o", "one.jsonl")
    said = run(*same, "--device", "cpu,cpu", "-o", "two.jsonl")
    assert said["images"] == 7 and Path("two.jsonl").read_text() == Path("one.jsonl").read_text()
    run("photos", "--device", "cpu,abacus", "-o", "bad.jsonl", status=2)
    assert "abacus" in run.told


def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_the_parts(
    run: Command, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "PART_S", 0)
    write, written = write_whole, list[Path]()

    def full(file: Path, content: bytes) -> None:
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file)
        write(file, content)

    monkeypatch.setattr(unfinished, "write_whole", full)
    command = ["photos", "--max-batch-size", "2", "-o", "out.jsonl"]
    run(*command, status=2)
    assert run.last_line.endswith("out.jsonl.unfinished: No space left on device")
    monkeypatch.setattr(unfinished, "write_whole", write)
    said = run(*command)
    assert (said["earlier"], said["images"]) == (4, 3)
    assert [row["file"] for row in lines("out.jsonl")] == photos
