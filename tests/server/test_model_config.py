"""config.json of a model folder: each field right, or refused in one sentence at the start; never an error later."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.cli import main
from server.errors import EngineError, SettingsError
from server.model_config import OF_TIMM
from tests.server.model_folders import classify, edit, load


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """A change of one field, its name with dots."""
    *parents, name = path.split(".")

    def change(config: dict[str, Any]) -> None:
        for parent in parents:
            config = config[parent]
        config[name] = value

    return change


RIGHT: dict[str, object] = {
    "pretrained_cfg.crop_pct": "0.9",
    "pretrained_cfg.crop_mode": "squash",
    "pretrained_cfg.interpolation": "lanczos",
    "pretrained_cfg.mean": [0, 0, 0],
    "pretrained_cfg.std": [1, 1, 1],
    "pretrained_cfg.colour": "unknown fields are left alone",
    "pretrained_cfg.input_size": None,
    "pretrained_cfg.num_classes": None,
    "model_args.drop_path_rate": 0.1,
    "model_args.in_chans": 3,
    "num_classes": None,
    "architecture": "vit_tiny_patch16_224.augreg_in21k",
}


@pytest.mark.parametrize("field", RIGHT)
def test_what_is_clear_is_taken(field: str, folder: Path) -> None:
    edit(folder, put(field, RIGHT[field]))
    assert set(classify(load(folder))[0]) == {"cat", "dog", "goldfish"}


WRONG: list[tuple[str, object, str]] = [
    ("pretrained_cfg.crop_pct", 0, "crop_pct.*0.1"),
    ("pretrained_cfg.crop_pct", -0.9, "crop_pct"),
    ("pretrained_cfg.crop_pct", 87.5, "crop_pct.*less than or equal to 1"),
    ("pretrained_cfg.crop_pct", "most", "crop_pct.*'most'"),
    ("pretrained_cfg.crop_mode", "border", "crop_mode.*'center' or 'squash'"),
    ("pretrained_cfg.interpolation", "area", "interpolation.*'bicubic'.*'area'"),
    ("pretrained_cfg.interpolation", "random", "interpolation"),
    ("pretrained_cfg.interpolation", "", "interpolation"),
    ("pretrained_cfg.mean", [0.5], "mean"),
    ("pretrained_cfg.mean", 0.5, "mean"),
    ("pretrained_cfg.mean", [0.5] * 4, "mean"),
    ("pretrained_cfg.mean", [123.7, 116.3, 103.5], "mean.*less than or equal to 1.*123.7"),
    ("pretrained_cfg.mean", [float("nan")] * 3, "mean"),
    ("pretrained_cfg.mean", ["red", "green", "blue"], "mean.*'red'"),
    ("pretrained_cfg.std", [0, 0, 0], "std"),
    ("pretrained_cfg.std", [float("inf")] * 3, "std"),
    ("pretrained_cfg.std", [58.4, 57.1, 57.4], "std"),
    ("pretrained_cfg.input_size", [3, 64, 64], "64 x 64 px .*32 x 32 px"),
    ("pretrained_cfg.input_size", [3, 32], "input_size"),
    ("pretrained_cfg.input_size", [3, 0, 0], "input_size"),
    ("pretrained_cfg.input_size", [3, 10**9, 10**9], "input_size"),
    ("pretrained_cfg.input_size", 32, "input_size"),
    ("pretrained_cfg.input_size", [1, 32, 32], "1 channels; they must have 3"),
    ("pretrained_cfg", None, "no 'pretrained_cfg'"),
    ("pretrained_cfg", [], "pretrained_cfg"),
    ("model_args.in_chans", 1, "1 channels"),
    ("model_args.in_chans", 4, "4 channels"),
    ("model_args.img_size", [32, 64], "px"),
    ("model_args.img_size", "wide", "cannot build .* with .*'img_size': 'wide'"),
    ("model_args.depth", 10**9, "depth is 1000000000; it must lie between 1 and 1000"),
    ("model_args.depth", 0, "depth is 0"),
    ("model_args.embed_dim", 900_000, "cannot build|do not fit"),  # 10 TB, of which nothing is taken
    ("model_args.embed_dim", 10**12, "embed_dim is 1000000000000"),
    ("model_args.num_heads", 7, "cannot build"),
    ("model_args.pretrained", True, "not an argument of a model"),
    ("model_args.checkpoint_path", "/etc/passwd", "not an argument of a model"),
    ("model_args.colour", "red", "cannot build"),
    ("model_args.global_pool", "most", "cannot build"),
    ("model_args.num_classes", 5, "3 classes; the model has 5"),
    ("model_args", [1], "model_args"),
    ("num_classes", 5, "3 classes; the model has 5"),
    ("num_classes", -1, "num_classes"),
    ("num_classes", 0, r"they have 'head\.\w+', 'head\.\w+', which the model lacks"),
    ("num_classes", "many", "num_classes"),
    ("architecture", "vit_of_nobody", "timm has no architecture 'vit_of_nobody'"),
    ("architecture", "hf-hub:someone/mine", "timm has no architecture"),
    ("architecture", "resnet18", "cannot build 'resnet18'"),
    ("architecture", 7, "architecture"),
    ("label_names", ["cat", "dog"], "lists 2 classes; the model has 3"),
    ("label_names", {"0": "cat", "2": "dog"}, "has no class 1"),
]


@pytest.mark.parametrize(
    ("field", "value", "reason"), WRONG, ids=[f"{field}={value!r:.40}" for field, value, _ in WRONG]
)
def test_what_is_wrong_stops_the_start_with_one_sentence(field: str, value: object, reason: str, folder: Path) -> None:
    edit(folder, put(field, value))
    with pytest.raises(SettingsError, match=reason) as refusal:
        load(folder)
    message = str(refusal.value)
    assert message.startswith("model mine: ") and "\n" not in message and len(message) < 700


TRANSFORMERS = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "id2label": {"0": "cat"}}

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read: it is not JSON"),
    "cut off": (b'{"architecture": "vit', "it is not JSON"),
    "bytes": (b"\xff\xfe\x00\xd8", "cannot be read"),
    "another encoding": ('{"architecture": "vit", "é": 1}'.encode("latin-1"), "cannot be read"),
    "brackets without end": (b"[" * 100_000, "cannot be read"),
    "digits without end": (b'{"num_classes": ' + b"9" * 10_000 + b"}", "cannot be read"),
    "a list": (b"[1, 2]", "it must be a mapping"),
    "of 20 MB": (b'"' + b" " * (20 << 20) + b'"', "more than 16777216 bytes"),
    "of transformers": (
        json.dumps(TRANSFORMERS).encode(),
        r"folder of Hugging Face transformers \('vit'\); .*'architecture'",
    ),
    "of nobody": (b'{"colour": "red"}', "names no 'architecture'"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_config_stops_the_start_with_one_sentence(case: str, folder: Path) -> None:
    content, reason = FILES[case]
    (folder / "config.json").write_bytes(content)
    with pytest.raises(SettingsError, match=reason) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 700


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_in_any_unicode_is_read(encoding: str, folder: Path) -> None:
    file = folder / "config.json"
    file.write_bytes(file.read_text().encode(encoding))
    assert len(classify(load(folder))[1]) == 3


def test_the_one_mapping_that_timm_once_wrote_is_read(folder: Path) -> None:
    def flatten(config: dict[str, Any]) -> None:
        config.update(config.pop("pretrained_cfg"), labels=config.pop("label_names"))

    edit(folder, flatten)
    assert set(classify(load(folder))[0]) == {"cat", "dog", "goldfish"}


def test_a_model_for_any_size_takes_the_one_that_its_config_names(folder: Path) -> None:
    edit(folder, put("model_args.dynamic_img_size", True))
    edit(folder, put("pretrained_cfg.input_size", [3, 64, 64]))
    loaded = load(folder)
    assert (loaded.info.num_tokens, loaded.info.preprocessing.input_size) == (65, (64, 64))
    assert len(classify(loaded)[1]) == 3


FIELDS = [
    *("architecture", "num_classes", "model_args", "pretrained_cfg", "label_names", "label_descriptions"),
    *(f"model_args.{name}" for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "in_chans")),
    *(
        f"model_args.{name}"
        for name in ("global_pool", "class_token", "reg_tokens", "mlp_ratio", "qkv_bias", "pos_embed")
    ),
    *(
        f"model_args.{name}"
        for name in ("dynamic_img_size", "init_values", "act_layer", "norm_layer", "drop_rate", "new")
    ),
    *(f"pretrained_cfg.{name}" for name in ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")),
    *(f"pretrained_cfg.{name}" for name in ("num_classes", "fixed_input_size", "label_names", "architecture", "new")),
]

SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-3, 70) | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(["avg", "token", "", "map", "max", "gelu", "layernorm", "none", "learn", "bilinear", "squash"])
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.sampled_from("012"), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
@example({"pretrained_cfg.crop_pct": 0.1})
@example({"model_args.patch_size": 64})
def test_whatever_a_field_holds_the_start_ends_or_every_image_has_an_answer(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model", dirs_exist_ok=True))
    for field, value in sorted(changes.items(), reverse=True):  # what lies deeper first: its parent may go
        edit(folder, put(field, value))
    try:
        labels, scores = classify(load(folder))
    except (SettingsError, EngineError) as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return
    assert sum(scores) == pytest.approx(1, abs=1e-3)
    assert all(label and isinstance(label, str) for label in labels)


def test_check_says_in_one_line_what_a_folder_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--check", str(folder)]) == 0
    shown = capsys.readouterr()
    assert shown.out == (
        f"{folder} is all right: vit_tiny_patch16_224, 3 classes, 24 features, 32 x 32 px, 19,635 parameters\n"
    )
    assert shown.err == ""


def test_check_says_in_one_line_what_is_wrong_with_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, put("pretrained_cfg.interpolation", "area"))
    assert main(["models", "--check", str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("tome-server: model model: ") and "interpolation" in shown.err


def test_check_computes_an_image(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("these shapes\ndo not multiply")

    monkeypatch.setattr("server.device.torch_backend.TorchBackend.outputs", fail)
    assert main(["models", "--check", str(folder)]) == 2
    assert "cannot compute a black image: these shapes do not multiply" in capsys.readouterr().err


def test_the_arguments_that_no_model_takes_are_those_of_timm() -> None:
    assert OF_TIMM == set(inspect.signature(timm.create_model).parameters) - {"kwargs"}
