"""benchmarks.folders on a few small photos and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import folders
from tests.server.model_folders import noise_photos, random_vit


@pytest.mark.parametrize("decode", ["cpu", "device"])
def test_it_tells_the_run_beside_what_bounds_it(
    decode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, photos = random_vit(tmp_path / "model"), noise_photos(tmp_path / "photos", 3)
    command = ["folders", "--images", str(photos), "--limit", "7", "--model", f"local-dir:{model}", "--r", "0", "4"]
    command += ["--batch", "2", "--duration", "0", "--rounds", "1", "--device", "cpu", "--backend", "torch"]
    monkeypatch.setattr("sys.argv", [*command, "--decode", decode])
    folders.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["images"], [row["r"] for row in told["rows"]]) == (7, [0, 4])
    for row in told["rows"]:
        assert (row["decoding"] > 0) == (decode == "device")
        assert row["bound"] < min(row["forward"], row["reading"]) and row["run"] > 0
        assert row["of_bound"] == row["run"] / row["bound"] and row["of_forward"] == row["run"] / row["forward"]


def test_links_go_round_the_photos(tmp_path: Path) -> None:
    photos = [tmp_path / name for name in ("a.jpg", "b.png")]
    for photo in photos:
        photo.write_text(photo.name)
    files = folders.linked(photos, 5, tmp_path / "links")
    assert [Path(file).read_text() for file in files] == ["a.jpg", "b.png", "a.jpg", "b.png", "a.jpg"]
    assert files == sorted(set(files))
