"""benchmarks.decoding on a few small photos, by the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import decoding


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(7):
        pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((120 + index, 90))
        image.save(tmp_path / (f"{index}.png" if index == 3 else f"{index}.jpg"))
    return tmp_path


def test_it_tells_speeds_and_that_answers_stay_the_same(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoding, "ROUNDS", 1)
    command = ["decoding", "--images", str(photos), "--device", "cpu", "--batch", "2,4"]
    monkeypatch.setattr("sys.argv", command)
    decoding.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["photos"], told["left_to_pillow"], told["agreement"]) == (6, 1, 1.0)
    paths = [(row["path"], row["batch"]) for row in told["rows"]]
    assert paths[0] == ("Pillow, all cores", None) and paths[1:] == [
        (path, size) for size in (2, 4) for path in ("device, decoded", "device, decoded and resized")
    ]
    assert all(row["images_per_s"] > 0 and row["cpu_ms"] > 0 for row in told["rows"])


def test_photos_of_which_the_engine_takes_none_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(2):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{index}.png")
    monkeypatch.setattr("sys.argv", ["decoding", "--images", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit):
        decoding.main()
    assert "decodes none of the 2 photos" in capsys.readouterr().err
