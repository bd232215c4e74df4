"""`tome-server explain` on a tiny model: its picture, its line, and messages for all that is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.cli import main
from server.commands.explain import CAPTION, GAP, PANEL, _blocks
from server.device.models import load_model
from server.images.pillow import decode
from server.model_spec import ModelSpec
from tests.server.conftest import encode


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    file = tmp_path / "photo.png"
    file.write_bytes(encode(Image.fromarray(pixels)))
    return file


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(source=f"local-dir:{folder}", name="tiny")


def explain(folder: Path, photo: Path, *more: str) -> list[Image.Image]:
    """Runs the command; gives the panels."""
    output = photo.with_name("out.png")
    assert main(["explain", str(photo), "-o", str(output), "--model", f"local-dir:{folder}", *more]) == 0
    with Image.open(output) as sheet:
        assert (sheet.format, sheet.mode, sheet.height) == ("PNG", "RGB", PANEL + CAPTION)
        count, rest = divmod(sheet.width + GAP, PANEL + GAP)
        assert rest == 0
        return [sheet.crop((left, 0, left + PANEL, PANEL)) for left in range(0, count * (PANEL + GAP), PANEL + GAP)]


def test_the_photo_stands_first_as_the_model_sees_it(tiny_folder: Path, photo: Path) -> None:
    seen, first, last = explain(tiny_folder, photo, "--r", "3")
    pixels = decode(photo.read_bytes(), load_model(spec(tiny_folder)).info.preprocessing, 10_000)
    assert seen == Image.frombytes("RGB", (32, 32), pixels).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    assert len({panel.tobytes() for panel in (seen, first, last)}) == 3


def test_the_line_names_the_class_and_the_tokens_of_every_block(
    tiny_folder: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explain(tiny_folder, photo, "--r", "4,1", "--blocks", "2")
    (line,) = capsys.readouterr().out.splitlines()
    answer = re.fullmatch(r"(.+): (\d+\.\d%) (cat|dog|goldfish); tokens 17, after each block 13 12", line)
    assert answer and answer[1] == str(photo)
    assert main(["classify", "--model", f"local-dir:{tiny_folder}", "--r", "4,1", "--top-k", "1", str(photo)]) == 0
    assert capsys.readouterr().out.split() == [str(photo), answer[2], answer[3]]


def test_what_is_painted_goes_by_r(tiny_folder: Path, photo: Path) -> None:
    seen, still = explain(tiny_folder, photo, "--blocks", "2", "--r", "0")
    assert seen == still
    painted = {explain(tiny_folder, photo, "--blocks", "2", "--r", r)[1].tobytes() for r in ("0", "2", "8", "8,2")}
    assert len(painted) == 4


def test_a_block_shows_what_it_and_those_before_it_merged(tiny_folder: Path, photo: Path) -> None:
    seen, first, second = explain(tiny_folder, photo, "--r", "0,5", "--blocks", "1,2")
    assert seen == first != second
    assert explain(tiny_folder, photo, "--r", "0,5", "--blocks", " 2, 1 ") == [seen, second, first]


def test_the_default_blocks_are_spread_over_the_depth_and_end_with_the_last() -> None:
    spread = {num_blocks: _blocks(None, num_blocks) for num_blocks in (1, 2, 3, 5, 12, 24)}
    assert spread == {1: [1], 2: [1, 2], 3: [1, 2, 3], 5: [2, 4, 5], 12: [4, 8, 12], 24: [8, 16, 24]}


def changed(folder: Path, copy: Path, *, size: int, patch: int | list[int]) -> Path:
    """A copy of the tiny model for inputs and patches of another size."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model_args"] |= {"img_size": size, "patch_size": patch}
    config["pretrained_cfg"]["input_size"] = [3, size, size]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_the_rim_of_an_input_that_fills_no_patch_is_left_out(tiny_folder: Path, photo: Path, tmp_path: Path) -> None:
    """As in models of 384 px with patches of 14."""
    folder = changed(tiny_folder, tmp_path / "rim", size=38, patch=8)
    seen, *_ = explain(folder, photo)
    pixels = decode(photo.read_bytes(), load_model(spec(folder)).info.preprocessing, 10_000)
    in_patches = Image.frombytes("RGB", (38, 38), pixels).crop((0, 0, 32, 32))
    assert seen == in_patches.resize((PANEL, PANEL), Image.Resampling.BICUBIC)


def test_a_model_whose_patches_are_no_squares_is_refused(
    tiny_folder: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(tiny_folder, tmp_path / "oblong", size=32, patch=[8, 16])
    source = f"local-dir:{folder},weights=random"
    assert main(["explain", str(photo), "-o", str(tmp_path / "out.png"), "--model", source]) == 2
    assert "its 4 x 2 patches cannot be painted as squares of 16 px" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--blocks", "0"], "--blocks is '0'; it must list blocks between 1 and 2"),
        (["--blocks", "1,3"], "--blocks is '1,3'; it must list blocks between 1 and 2"),
        (["--blocks", ""], "between 1 and 2"),
        (["--blocks", "1,,2"], "between 1 and 2"),
        (["--blocks", "-1"], "between 1 and 2"),
        (["--blocks", "9" * 5000], "between 1 and 2"),
        (["--blocks", "last"], "--blocks is 'last'"),
        (["--r", "9"], "r is 9; each r must lie between 0 and 8"),
        (["--device", "abacus"], "abacus"),
        (["-o", "out.jpg"], "-o is out.jpg; "),
        (["-o", "nowhere/out.png"], "-o is nowhere/out.png: there is no folder nowhere"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(
    arguments: list[str],
    named: str,
    tiny_folder: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photo.parent)
    # `--blocks -1` reads as a flag, so it is given as one word.
    words = ["=".join(arguments)] if arguments[0] == "--blocks" else arguments
    assert main(["explain", "photo.png", "-o", "out.png", "--model", f"local-dir:{tiny_folder}", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("tome-server: ") and named in shown.err
    assert shown.out == "" and not Path("out.png").exists()


@pytest.mark.parametrize("photo_name", ["missing.png", ".", "broken.png"])
def test_a_photo_that_cannot_be_read_is_named(
    photo_name: str,
    tiny_folder: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photo.parent)
    Path("broken.png").write_bytes(photo.read_bytes()[:60])
    assert main(["explain", photo_name, "-o", "out.png", "--model", f"local-dir:{tiny_folder}"]) == 2
    assert capsys.readouterr().err.startswith(f"tome-server: {photo_name}: ")
    assert not Path("out.png").exists()


def test_an_output_must_be_named(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["explain", str(photo)])
    assert end.value.code == 2
    assert "-o/--output" in capsys.readouterr().err
