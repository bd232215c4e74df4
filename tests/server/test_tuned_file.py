"""Files of tuned numbers: where they lie, which of them is taken, and what is said of one that cannot be used."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from server.cli import main
from server.device import tuned_file
from server.device.models import LoadedModel, load_model
from server.device.tuned_file import beside, find, in_state, save
from server.errors import SettingsError
from server.model_config import weights_in
from server.model_spec import ModelSpec
from tests.core.tuned_numbers import numbers
from tests.server.model_folders import load
from tome_core.tuned import Tuned, fingerprint


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, for tuned numbers to lie in."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def untuned(folder: Path) -> LoadedModel:
    return load(folder)


@pytest.fixture
def tuned(untuned: LoadedModel) -> Tuned:
    return numbers(untuned.merged, (2, 3), (5, 8))


def spec(source: str, **more: str) -> ModelSpec:
    return ModelSpec.model_validate({"source": source, **more})


def test_they_lie_beside_weights_that_have_a_place_of_their_own(tmp_path: Path) -> None:
    weights = tmp_path / "mine.safetensors"
    wanted = tmp_path / "mine.tuned.safetensors"
    assert beside(spec("some_vit", weights=str(weights)), weights) == wanted
    assert beside(spec(f"local-dir:{tmp_path}"), weights) == wanted
    for model in (spec("some_vit"), spec("hf-hub:someone/some_vit")):
        assert beside(model, weights) is None
    assert beside(spec("some_vit", weights="random"), None) is None
    assert beside(spec("bundled"), weights) is None
    wanted.touch()
    assert beside(spec("bundled"), weights) == wanted
    assert in_state("vit", "ab" * 32, tmp_path) == tmp_path / "tuned" / "vit-abababababab.safetensors"
    assert in_state("vit", "ab" * 32, None) is None


def test_what_lies_beside_the_weights_is_taken(folder: Path, untuned: LoadedModel, tuned: Tuned) -> None:
    assert (untuned.tuned, untuned.tuned_file, untuned.info.tuned) == (None, None, ())
    assert save(tuned, spec(f"local-dir:{folder}"), untuned.weights, None) == (folder / "model.tuned.safetensors", None)
    loaded = load(folder)
    assert loaded.info.tuned == ((2, 3), (5, 8))
    assert loaded.tuned_file == folder / "model.tuned.safetensors"
    assert loaded.tuned == hashlib.sha256(loaded.tuned_file.read_bytes()).hexdigest()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for r in (0, 1, 4):
            assert torch.equal(loaded.merged(images, r), untuned.merged(images, r))
        for r in (2, 3, 5, 8):
            assert not torch.allclose(loaded.merged(images, r), untuned.merged(images, r), atol=1e-2)
        untuned.merged.take_tuned(tuned)
        assert torch.equal(loaded.merged(images, 5), untuned.merged(images, 5))
    assert load(folder, tuned="none").tuned is None


@pytest.mark.parametrize("schedule", [(0, 0), (1, 1), (4, 0), (3, 0), (0, 3), (8, 2), (4, 4), (8, 8), (4, 3)])
def test_the_http_side_knows_which_r_is_tuned(
    schedule: tuple[int, int], folder: Path, untuned: LoadedModel, tuned: Tuned
) -> None:
    save(tuned, spec(f"local-dir:{folder}"), untuned.weights, None)
    loaded = load(folder)
    assert loaded.info.is_tuned(schedule) == (loaded.merged.at(schedule) is not loaded.merged)
    assert not untuned.info.is_tuned(schedule)


def test_what_has_no_place_beside_the_weights_lies_in_the_state_folder(
    folder: Path, untuned: LoadedModel, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled, state = spec("bundled", name="mine"), tmp_path / "state"
    kept = state / "tuned" / f"mine-{fingerprint(untuned.merged.model)[:12]}.safetensors"
    assert save(tuned, bundled, untuned.weights, state) == (kept, None)
    monkeypatch.setattr("server.device.models.BUNDLED", folder)
    assert load_model(bundled, state).tuned_file == kept
    assert load_model(bundled, None).tuned is None
    assert load_model(spec("bundled", name="other"), state).tuned is None
    torch.nn.init.zeros_(untuned.merged.get_parameter("model.head.bias"))
    assert find(bundled, untuned.merged, untuned.weights, state) == (None, [])  # other weights have another place
    with pytest.raises(SettingsError, match="no folder of its own, and there is no state folder; use -o FILE"):
        save(tuned, bundled, untuned.weights, None)


def test_a_folder_that_cannot_be_written_leaves_the_state_folder_and_the_last_one_counts(
    folder: Path, untuned: LoadedModel, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = spec(f"local-dir:{folder}", name="mine"), tmp_path / "state"
    shipped = save(numbers(untuned.merged, (1, 1)), model, untuned.weights, state)[0]
    write = Tuned.save

    def refuse(self: Tuned, file: Path) -> None:
        if file.parent == folder:
            raise PermissionError(13, "Permission denied")
        write(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(Tuned, "save", refuse)
        kept, refusal = save(tuned, model, untuned.weights, state)
    assert refusal == f"{shipped} cannot be written (Permission denied)"
    assert load(folder, name="mine").info.tuned == ((1, 1),)
    assert load_model(model, state).tuned_file == kept
    assert save(tuned, model, untuned.weights, state) == (shipped, None)
    assert load_model(model, state).tuned_file == shipped and not kept.exists()


def test_weights_are_hashed_only_where_there_is_something_to_compare(
    folder: Path, untuned: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned_file, "fingerprint", None)
    monkeypatch.setattr("tome_core.tuned.fingerprint", None)
    model = spec(f"local-dir:{folder}")
    assert find(model, untuned.merged, untuned.weights, tmp_path) == (None, [])
    assert find(model, untuned.merged, untuned.weights, Path("~nobody/state")) == (None, [])
    assert load_model(spec("vit_tiny_patch16_224", weights="random"), tmp_path).tuned is None


def other_weights(folder: Path, untuned: LoadedModel) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"] += 1
    numbers(untuned.merged, (2, 3)).save(folder / "model.tuned.safetensors")
    save_file(weights, folder / "model.safetensors")


def other_names(folder: Path, untuned: LoadedModel) -> None:
    tuned = numbers(untuned.merged, (2, 3))
    tensors = dict(tuned.bands[0].tensors) | {"blocks.9.norm1.bias": torch.zeros(24)}
    tuned._replace(bands=[tuned.bands[0]._replace(tensors=tensors)]).save(folder / "model.tuned.safetensors")


def other_shapes(folder: Path, untuned: LoadedModel) -> None:
    tuned = numbers(untuned.merged, (2, 3))
    tensors = {name: tensor[:-1].clone() for name, tensor in tuned.bands[0].tensors.items()}
    tuned._replace(bands=[tuned.bands[0]._replace(tensors=tensors)]).save(folder / "model.tuned.safetensors")


def cut_off(folder: Path, untuned: LoadedModel) -> None:
    file = folder / "model.tuned.safetensors"
    numbers(untuned.merged, (2, 3)).save(file)
    file.write_bytes(file.read_bytes()[:-10])


def no_numbers(folder: Path, untuned: LoadedModel) -> None:
    (folder / "model.tuned.safetensors").write_bytes(b"tuned")


def weights_instead(folder: Path, untuned: LoadedModel) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model.tuned.safetensors")


def a_folder(folder: Path, untuned: LoadedModel) -> None:
    (folder / "model.tuned.safetensors").mkdir()


def bands_that_meet(folder: Path, untuned: LoadedModel) -> None:
    numbers(untuned.merged, (2, 4), (3, 5)).save(folder / "model.tuned.safetensors")


def nested_without_end(folder: Path, untuned: LoadedModel) -> None:
    facts = {"format": "tome-tuned-1", "bands": "[" * 100_000, "weights": "{}", "about": "{}"}
    save_file({"2-3.norm.bias": torch.zeros(24)}, folder / "model.tuned.safetensors", facts)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_weights, r"is stale: made with other weights or for another image size \(\w{12}, not \w{12}\)"),
        (other_names, "is stale: made for another model: this one has no norm or bias 'blocks.9.norm1.bias'"),
        (other_shapes, "is stale: made for another model: .* has 23 numbers, not 24"),
        (cut_off, "holds no tuned numbers: "),
        (no_numbers, "holds no tuned numbers: "),
        (weights_instead, "holds no tuned numbers: its format is None; this version reads 'tome-tuned-1'"),
        (a_folder, "cannot be read: Is a directory"),
        (bands_that_meet, r"holds no tuned numbers: its bands are \[\[2, 4\], \[3, 5\]\]"),
        (nested_without_end, "holds no tuned numbers: "),
    ],
)
def test_one_that_cannot_be_used_is_logged_and_one_that_is_named_stops_the_start(
    spoil: Callable[[Path, LoadedModel], None],
    said: str,
    folder: Path,
    untuned: LoadedModel,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(folder, untuned)
    file = folder / "model.tuned.safetensors"
    loaded = load(folder)
    assert (loaded.tuned, loaded.info.tuned, loaded.merged.tuned) == (None, (), None)
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert line.getMessage().startswith(f"model mine: tuned numbers are not used: {file} ")
    with pytest.raises(SettingsError, match=f"^model mine: {file} {said}") as refusal:
        load(folder, tuned=str(file))
    assert "\n" not in str(refusal.value)
    assert load(folder, tuned="none").tuned is None
    assert main(["models", "--check", str(folder)]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_file_that_is_named_must_be_there(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"^model mine: there is no file of tuned numbers \S+absent$"):
        load(folder, tuned=str(folder / "absent"))
    with pytest.raises(SettingsError, match="cannot be read"):
        load(folder, tuned="nul\0byte")


def test_a_file_anywhere_can_be_named(folder: Path, untuned: LoadedModel, tuned: Tuned, tmp_path: Path) -> None:
    tuned.save(tmp_path / "elsewhere")
    assert load(folder, tuned=str(tmp_path / "elsewhere")).tuned_file == tmp_path / "elsewhere"


def test_tuned_numbers_are_no_weights(folder: Path, tuned: Tuned, capsys: pytest.CaptureFixture[str]) -> None:
    tuned.save(folder / "model.tuned.safetensors")
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert weights_in(folder) == folder / "mine.safetensors"
    file = folder / "model.tuned.safetensors"
    assert main(["models", "--model", f"local-dir:{folder}", "--weights", str(file)]) == 2
    assert f"{file} holds tuned numbers, which go with weights; give it with tuned=" in capsys.readouterr().err
    (folder / "mine.safetensors").unlink()
    with pytest.raises(SettingsError, match="has no model.safetensors"):
        weights_in(folder)


def test_models_names_the_bands_and_the_file(
    folder: Path, untuned: LoadedModel, tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "model.tuned.safetensors"
    tuned.save(file)
    source = f"local-dir:{folder}"
    assert main(["models", "--model", source]) == 0
    assert f"  tuned for r of 2 to 3, 5 to 8: {file}\n" in capsys.readouterr().out
    assert main(["models", "--model", source, "--tuned", "none"]) == 0
    assert "tuned" not in capsys.readouterr().out
    assert main(["models", "--json", "--model", source]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["tuned"], told["tuned_file"]) == ([[2, 3], [5, 8]], str(file))
    assert main(["models", "--check", str(folder)]) == 0
    assert capsys.readouterr().out.endswith(" parameters, tuned for r of 2 to 3, 5 to 8\n")


@pytest.mark.parametrize("command", ["models", "classify", "explain", "export"])
def test_a_command_takes_them_from_the_state_folder_that_is_named(
    command: str, folder: Path, untuned: LoadedModel, tuned: Tuned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if command == "export":
        pytest.importorskip("onnx")
    kept = in_state("mine", fingerprint(untuned.merged.model), tmp_path / "state")
    assert kept is not None
    kept.parent.mkdir(parents=True)
    tuned.save(kept)
    photo = tmp_path / "photo.png"
    Image.new("RGB", (20, 20)).save(photo)
    more = {
        "models": [],
        "classify": ["--device", "cpu", str(photo)],
        "explain": ["--device", "cpu", "-o", str(tmp_path / "painted.png"), str(photo)],
        "export": ["-o", str(tmp_path / "mine.onnx")],
    }
    plain = [command, "--model", f"local-dir:{folder},name=mine", *more[command]]
    with caplog.at_level(logging.INFO):
        assert main([*plain, "--state-dir", "none"]) == 0
        assert "tuned numbers" not in caplog.text
        assert main([*plain, "--state-dir", str(tmp_path / "state")]) == 0
    assert f"model mine: tuned numbers of {kept}" in caplog.text
