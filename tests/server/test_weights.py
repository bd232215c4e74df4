"""Weights files: prefixes that are taken off, sizes that are resampled, and one sentence for what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.errors import SettingsError
from tests.server.model_folders import classify, edit, load

State = dict[str, Tensor]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[State], Mapping[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    changed = change(load_file(file))  # reads through a map of the file, which must not be written to
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "changed")
    (folder / "changed").replace(file)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "state_dict_ema.", "timm_model.", "module._orig_mod.", "a.b.c."]
)
def test_a_prefix_that_all_names_share_is_taken_off(prefix: str, folder: Path) -> None:
    before = classify(load(folder))
    rewrite(folder, lambda state: {prefix + name: tensor for name, tensor in state.items()})
    assert classify(load(folder)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_floating_point_type_are_taken(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    assert sum(classify(load(folder))[1]) == pytest.approx(1)


def several_sets(state: State) -> State:
    return {f"{kind}.{name}": tensor.clone() for kind in ("model", "ema") for name, tensor in state.items()}


REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "two sets": (several_sets, "several sets of weights, named 'ema.' and 'model.'"),
    "another model's": (
        lambda state: {"vit.embeddings.cls": torch.zeros(1)},
        "of another model: none of its 1 tensors",
    ),
    "no tensor at all": (lambda state: {}, "of another model: none of its 0 tensors"),
    "one too many": (lambda state: state | {"extra": torch.zeros(1)}, "they have 'extra', which the model lacks"),
    "one too few": (lambda state: {n: t for n, t in state.items() if n != "head.bias"}, "they lack 'head.bias'"),
    "a prefix, and one too few": (
        lambda state: {f"module.{n}": t for n, t in state.items() if n != "cls_token"},
        "they lack 'cls_token'",
    ),
    "a head for more classes": (
        lambda state: state | {"head.weight": torch.zeros(7, 24), "head.bias": torch.zeros(7)},
        "they are for 7 classes, and it has 3",
    ),
    "another width": (
        lambda state: {n: torch.cat([t, t], -1) for n, t in state.items()},
        "cls_token is 1 x 1 x 48 in the file and 1 x 1 x 24 in the model and",
    ),
    "positions of no square": (
        lambda state: state | {"pos_embed": torch.zeros(1, 13, 24)},
        "pos_embed is 1 x 13 x 24 in the file and 1 x 17 x 24 in the model",
    ),
    "whole numbers": (lambda state: {n: (t * 9).to(torch.int8) for n, t in state.items()}, "is of type int8"),
    "eight bits": (lambda state: {n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, "is of type float8"),
    "NaN": (lambda state: state | {"head.weight": state["head.weight"] * float("nan")}, "head.weight holds NaN"),
    "infinity": (lambda state: state | {"norm.bias": torch.full((24,), float("inf"))}, "norm.bias holds NaN or inf"),
    "too large": (lambda state: state | {"norm.bias": torch.full((24,), 1e300, dtype=torch.float64)}, "infinity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused_in_one_sentence(case: str, folder: Path) -> None:
    change, reason = REFUSED[case]
    rewrite(folder, change)
    with pytest.raises(SettingsError, match=reason) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_positions_for_another_size_are_resampled_as_timm_does(folder: Path) -> None:
    """The same as the model of the old size gives, resized by timm."""
    old: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    old.set_input_size(img_size=(64, 64))

    def enlarge(config: dict[str, object]) -> None:
        config["model_args"]["img_size"] = 64  # type: ignore[index]
        config["pretrained_cfg"]["input_size"] = [3, 64, 64]  # type: ignore[index]

    edit(folder, enlarge)
    loaded = load(folder)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.merged(images), old.eval()(images))
    assert (loaded.info.num_tokens, loaded.info.preprocessing.input_size) == (65, (64, 64))


def only(folder: Path, *names: str) -> None:
    """Leaves the weights under these names instead."""
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()


def test_the_only_safetensors_file_is_the_weights(folder: Path) -> None:
    only(folder, "best.safetensors")
    assert len(classify(load(folder))[1]) == 3


def unreadable(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def sharded(folder: Path) -> None:
    only(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda folder: only(folder), "has no model.safetensors"),
    "a pickle": (lambda folder: only(folder, "pytorch_model.bin"), "read from safetensors only"),
    "several": (lambda folder: only(folder, "a.safetensors", "b.safetensors"), "a.safetensors, b.safetensors"),
    "parts": (sharded, "has its weights in parts"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "a header that lies": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        "not a safetensors file",
    ),
    "a folder": (unreadable, "there is no weights file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_weights_file_that_is_none_is_refused_in_one_sentence(case: str, folder: Path) -> None:
    spoil, reason = FILES[case]
    spoil(folder)
    with pytest.raises(SettingsError, match=reason) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
