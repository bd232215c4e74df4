"""Files of tuned numbers: read as they were written, and refused with one sentence where they do not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.core.tuned_numbers import numbers
from tests.core.variants import Case
from tome_core import wrap
from tome_core.tuned import DTYPES, FORMAT, Band, Tuned, TunedError, fingerprint, fingerprints

Build = Callable[..., Any]

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def all_tuned(draw: st.DrawFn) -> Tuned:
    """Bands of all kinds, with numbers of all kinds."""
    bounds = sorted(draw(st.sets(st.integers(1, 10**6), min_size=2, max_size=6)))
    bands = []
    for low, high in zip(bounds[::2], bounds[1::2], strict=False):
        named = draw(st.dictionaries(st.text(min_size=1), st.lists(FINITE, max_size=5), min_size=1, max_size=3))
        low = draw(st.sampled_from([low, high]))
        bands.append(Band(low, high, {name: torch.tensor(row, dtype=torch.float32) for name, row in named.items()}))
    weights = draw(st.dictionaries(st.sampled_from(["float32", "bfloat16", "float16"]), st.text()))
    return Tuned(bands, weights, draw(st.dictionaries(st.text(), JSON, max_size=3)))


@given(all_tuned())
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, tuned: Tuned) -> None:
    file = tmp_path_factory.getbasetemp() / "round.tuned.safetensors"
    tuned.save(file)
    read = Tuned.load(file)
    assert (read.weights, read.about) == (tuned.weights, tuned.about)
    assert [band[:2] for band in read.bands] == [band[:2] for band in tuned.bands]
    for got, wanted in zip(read.bands, tuned.bands, strict=True):
        assert got.tensors.keys() == wanted.tensors.keys()
        assert all(torch.equal(got.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


def test_any_one_row_can_be_written(tmp_path: Path) -> None:
    """A slice, a parameter, one row for two bands."""
    row = torch.nn.Parameter(torch.arange(8.0))
    tuned = Tuned([Band(1, 2, {"a": row[::2], "b": row}), Band(3, 3, {"b": row})], {}, {})
    tuned.save(tmp_path / "file")
    first, second = Tuned.load(tmp_path / "file").bands
    assert first.tensors["a"].tolist() == [0, 2, 4, 6]
    assert first.tensors["b"].tolist() == second.tensors["b"].tolist() == row.tolist()


def test_every_family_takes_its_own_in_every_dtype(case: Case, tmp_path: Path) -> None:
    model, merged, images = case
    numbers(merged).save(tmp_path / "file")
    known = fingerprints(model)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        assert fingerprint(model) == known[str(dtype).removeprefix("torch.")]
        merged.load_tuned(tmp_path / "file")
        with torch.inference_mode():
            assert merged(images.to(dtype), 3).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_is_known_before_the_dtype_is_changed(build: Build, dtype: torch.dtype) -> None:
    model = build()
    assert fingerprint(model, dtype) == fingerprint(model.to(dtype)) == fingerprint(build(), dtype)


def test_a_fingerprint_tells_every_number_and_buffer_apart(build: Build) -> None:
    model = build("beit_base_patch16_224")
    model.register_buffer("flag", torch.tensor(True))
    found = {fingerprint(model)}
    state = model.state_dict()
    for i, tensor in enumerate(state.values(), 2):
        with torch.no_grad():
            last = tensor.view(-1)[-1:]
            last.copy_(~last if tensor.dtype == torch.bool else last + 1)
        found.add(fingerprint(model))
        assert len(found) == i


def test_a_file_is_small(build: Build, tmp_path: Path) -> None:
    merged = wrap(build("vit_tiny_patch16_224", img_size=224, embed_dim=192, depth=12))
    tuned = numbers(merged, (12, 18))
    tuned.save(tmp_path / "file")
    assert sum(tensor.numel() for tensor in tuned.bands[0].tensors.values()) == 30_336
    assert (tmp_path / "file").stat().st_size < 200_000


METADATA: dict[str, Any] = {"format": FORMAT, "bands": [[3, 4]], "weights": {"float32": "ab"}, "about": {}}


def write(file: Path, tensors: dict[str, Tensor] | None = None, **changed: Any) -> Path:
    """A file of one band with some of its metadata changed: to a string, to JSON of something else, or left out."""
    facts = {name: fact for name, fact in (METADATA | changed).items() if fact is not None}
    tensors = {"3-4.norm.bias": torch.ones(2)} if tensors is None else tensors
    save_file(tensors, file, {name: f if isinstance(f, str) else json.dumps(f) for name, f in facts.items()})
    return file


BANDS_WRONG = [
    [], {}, 5, None, "3-4", [3, 4], [[3]], [[3, 4, 5]], [["3", "4"]], [[3.0, 4.0]], [[True, True]], [[0, 4]], [[-3, 4]],
    [[4, 3]], [[3, 4], [3, 4]], [[3, 4], [4, 5]], [[5, 6], [3, 4]], [[3, 4], [10**400, 10**401]], [[3, 4], [5, 6]],
    [[3, None]], [{"3": 4}], [[[3], [4]]], [[1, 2]], float("nan"), [[float("nan"), 4]], [[3, float("inf")]],
]  # fmt: skip


@pytest.mark.parametrize("bands", BANDS_WRONG, ids=lambda bands: str(bands)[:30])
def test_bands_that_are_none_are_refused(tmp_path: Path, bands: Any) -> None:
    file = write(tmp_path / "file", bands=json.dumps(bands))
    with pytest.raises(TunedError, match=r"file holds no tuned numbers: its bands are "):
        Tuned.load(file)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"format": "tome-tuned-0"}, "its format is 'tome-tuned-0'; this version reads 'tome-tuned-1'"),
    "no format": ({"format": None}, "its format is None"),
    "no bands": ({"bands": None}, "its metadata lacks bands"),
    "nothing but a format": ({"bands": None, "weights": None, "about": None}, "lacks about, bands, weights"),
    "no JSON": ({"bands": "[[3, 4"}, "Expecting"),
    "JSON nested too deep": ({"about": "[" * 100_000}, "recursion"),
    "a number too long": ({"bands": "9" * 10_000}, "digits"),
    "weights in a list": ({"weights": ["ab"]}, "its weights must be"),
    "weights that are numbers": ({"weights": {"float32": 1}}, "its weights must be"),
    "about in a list": ({"about": [["a", 1]]}, "must be a JSON object"),
    "a matrix": ({"tensors": {"3-4.a": torch.ones(2, 2)}}, "3-4.a must be one row of finite float32"),
    "a number": ({"tensors": {"3-4.a": torch.tensor(1.0)}}, "3-4.a must be one row"),
    "half precision": ({"tensors": {"3-4.a": torch.ones(2, dtype=torch.bfloat16)}}, "3-4.a must be one row"),
    "integers": ({"tensors": {"3-4.a": torch.ones(2, dtype=torch.int64)}}, "3-4.a must be one row"),
    "NaN": ({"tensors": {"3-4.a": torch.tensor([1.0, float("nan")])}}, "3-4.a must be one row"),
    "infinity": ({"tensors": {"3-4.a": torch.tensor([float("inf")])}}, "3-4.a must be one row"),
    "a tensor of no band": ({"tensors": {"3-4.a": torch.ones(2), "3-5.a": torch.ones(2)}}, "its bands are"),
    "no tensors": ({"tensors": {}}, "its bands are"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused(tmp_path: Path, name: str) -> None:
    changed, message = DAMAGED[name]
    file = write(tmp_path / "file", **changed)
    with pytest.raises(TunedError, match=f"file holds no tuned numbers: .*{message}"):
        Tuned.load(file)


@pytest.mark.parametrize("content", [b"", b"\0", b"PK\3\4 other", struct.pack("<Q", 2**60) + b"{}", b"\xff" * 100])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TunedError, match="file holds no tuned numbers: "):
        Tuned.load(tmp_path / "file")


@settings(max_examples=200)
@given(st.data())
def test_no_damage_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = write(tmp_path_factory.getbasetemp() / "damaged")
    content = bytearray(file.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        tuned = Tuned.load(file)
    except TunedError:
        return
    assert all(tensor.isfinite().all() for band in tuned.bands for tensor in band.tensors.values())


def test_other_models_and_weights_are_refused(build: Build, tmp_path: Path) -> None:
    tuned = numbers(wrap(build()))
    tuned.save(tmp_path / "file")

    def refused(model: Any, message: str) -> None:
        merged = wrap(model)
        with pytest.raises(TunedError, match=message):
            merged.load_tuned(tmp_path / "file")
        assert merged.tuned is None and merged.at(3) is merged

    wrap(build()).load_tuned(tmp_path / "file")
    refused(build(depth=2), "made for another model: this one has no norm or bias 'blocks.2.")
    refused(build(embed_dim=96), "made for another model: [a-z0-9.]+ has 48 numbers, not 96")
    refused(build().double(), "made for a model in float32 or bfloat16 or float16; this one is float64")
    changed = build()
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.weight[0, 0] += 1e-3
    refused(changed, "made with other weights or for another image size [(][0-9a-f]{12}, not [0-9a-f]{12}[)]")
    refused(build().bfloat16().float(), "made with other weights")


def test_matrices_are_not_taken(build: Build) -> None:
    merged = wrap(build())
    known = fingerprints(merged.model)
    for name in ("blocks.0.mlp.fc1.weight", "head.bias", "cls_token", "blocks.0", ""):
        with pytest.raises(TunedError, match=f"no norm or bias '{name}'"):
            Tuned([Band(3, 4, {name: torch.ones(10)})], known, {}).check(merged.model, merged.family)


def test_files_that_cannot_be_read_or_written(build: Build, tmp_path: Path) -> None:
    tuned = numbers(wrap(build()))
    for file in (tmp_path, tmp_path / "none", tmp_path / "none" / "file"):
        with pytest.raises(OSError):
            Tuned.load(file)
    for file in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(OSError):
            tuned.save(file)
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))


def test_a_file_is_replaced_whole(build: Build, tmp_path: Path) -> None:
    merged = wrap(build())
    file = tmp_path / "file"
    numbers(merged, (1, 2)).save(file)
    with open(file, "rb") as before:
        numbers(merged, (5, 6)).save(file)
        assert b"[[1, 2]]" in before.read()  # who has opened it reads on in the old one
    assert Tuned.load(file).bands[0][:2] == (5, 6) and list(tmp_path.iterdir()) == [file]
    assert all(tensor.dtype == torch.float32 for tensor in load_file(file).values())
