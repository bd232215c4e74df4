"""What is exported gives torch's answers, for any batch, without a scatter; and no wrong file is left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx import ONNXProgram

from tome_core import ExportError, FixedR, MergedViT, Ramp, export, export_onnx, export_program, match, wrap
from tome_core.schedule import RLike

Build = Callable[..., VisionTransformer]
Session = Any  # onnxruntime has no types

ROOT = Path(__file__).resolve().parents[2]
SIZE = (96, 96)
SCHEDULES: list[RLike] = [0, 1000, [3, 0, 5], Ramp(6)]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "two prefix tokens": ("deit_tiny_distilled_patch16_224", {}),
    "avg pool, no prefix token": ("vit_medium_patch16_gap_240", {}),
    "map pool, no prefix token": ("vit_base_patch16_siglip_224", {}),
    "registers, LayerScale": ("vit_small_patch14_reg4_dinov2", {"img_size": 84}),
    "any image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
}


@pytest.fixture
def merged(build: Build) -> MergedViT:
    """One block, whose merging counts: all tokens are pooled, while a class token would not see it."""
    return wrap(build("vit_medium_patch16_gap_240", depth=1))


def onnx_answers(session: Session, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def open_onnx(file: Path) -> Session:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def assert_same_answers(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(got.argmax(dim=1), expected.argmax(dim=1))


def operators(program: ExportedProgram) -> set[str]:
    """The operators of a program as they are run in the end: nested graphs and composite operators taken apart."""
    return {str(node.target) for node in program.run_decompositions({}).graph.nodes if node.op == "call_function"}


def assert_no_scatter(names: set[str]) -> None:
    assert any("gather" in name.lower() for name in names)  # the check sees how merging moves tokens
    assert not {name for name in names if any(word in name.lower() for word in ("scatter", "index_put", "index_add"))}


@pytest.mark.parametrize("r", SCHEDULES)
def test_a_program_gives_the_models_logits_for_any_batch(build: Build, r: RLike) -> None:
    merged = wrap(build())
    program = export_program(merged, r, SIZE).module()
    for batch_size in (1, 2, 7):
        images = torch.randn(batch_size, 3, *SIZE)
        torch.testing.assert_close(program(images), merged(images, r))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # in torch 2.11
def test_strict_export_sees_the_same_graph_and_neither_has_a_scatter(merged: MergedViT) -> None:
    images = torch.randn(2, 3, *SIZE)
    strict = torch.export.export(FixedR(merged, 4), (images,), strict=True)
    found = operators(strict)
    assert_no_scatter(found)
    assert found == operators(export_program(merged, 4, SIZE, batch_size=2))
    torch.testing.assert_close(strict.module()(images), merged(images, 4))


def test_a_program_can_be_for_one_batch_size_alone(merged: MergedViT) -> None:
    program = export_program(merged, 4, SIZE, batch_size=1).module()
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(program(images[:1]), merged(images[:1], 4))
    with pytest.raises(AssertionError, match="images"):
        program(images)


def test_a_file_gives_torchs_answers_and_names_its_ends(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    assert_file_is_right(wrap(build(depth=2)), 4, SIZE, file)
    session = open_onnx(file)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", 3, 96, 96], "tensor(float)")
    assert (logits.name, logits.shape, logits.type) == ("logits", ["batch", 10], "tensor(float)")


@pytest.mark.slow
@pytest.mark.parametrize("r", SCHEDULES)
def test_files_of_all_kinds_of_schedules_are_right(build: Build, r: RLike, tmp_path: Path) -> None:
    assert_file_is_right(wrap(build()), r, SIZE, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_files_of_all_kinds_of_models_are_right(build: Build, name: str, tmp_path: Path) -> None:
    architecture, overrides = MODELS[name]
    model = build(architecture, depth=2, **overrides)
    assert_file_is_right(wrap(model), 5, model.patch_embed.img_size, tmp_path / "model.onnx")


def assert_file_is_right(merged: MergedViT, r: RLike, size: tuple[int, int], file: Path) -> None:
    written = export_onnx(merged, r, size, file)
    assert (written.path, written.num_bytes) == (file, file.stat().st_size)
    assert written.difference is not None and written.difference < 1e-3
    assert list(file.parent.iterdir()) == [file]
    if merged.token_counts(r)[-1] < merged.num_tokens:
        assert_no_scatter({node.op_type for node in onnx.load(file).graph.node})
    session = open_onnx(file)
    for batch_size in (1, 2, 7):
        images = torch.randn(batch_size, 3, *size)
        assert_same_answers(onnx_answers(session, images), merged(images, r))
    one_colour = torch.randn(3, 3, 1, 1).expand(3, 3, *size).contiguous()  # patches differ by their positions alone
    assert_same_answers(onnx_answers(session, one_colour), merged(one_colour, r))


def test_a_file_can_be_for_one_batch_size_alone(merged: MergedViT, tmp_path: Path) -> None:
    export_onnx(merged, 4, SIZE, tmp_path / "model.onnx", batch_size=1)
    session = open_onnx(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == [1, 3, 96, 96]
    images = torch.randn(1, 3, *SIZE)
    assert_same_answers(onnx_answers(session, images), merged(images, 4))


@pytest.mark.parametrize("opset", [export.OPSETS[0], export.OPSETS[-1]])
def test_every_opset_on_offer_works(merged: MergedViT, opset: int, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    assert export_onnx(merged, 4, SIZE, file, opset=opset).difference is not None
    assert [(each.domain, each.version) for each in onnx.load(file).opset_import] == [("", opset)]


def test_a_file_describes_itself_and_says_nothing_of_this_machine(merged: MergedViT, tmp_path: Path) -> None:
    facts = {"mean": (0.4, 0.5, 0.6), "labels": ["grève", "œuf"], "architecture": "vit"}
    export_onnx(merged, [3], SIZE, tmp_path / "model.onnx", metadata=facts)
    told = open_onnx(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    expected = {"schedule": [3], **facts, "mean": [0.4, 0.5, 0.6]}
    assert {name: json.loads(value) for name, value in told.items()} == expected
    content = (tmp_path / "model.onnx").read_bytes()
    assert str(ROOT).encode() not in content and b"stack_trace" not in content


class Plan(nn.Module):
    """A plan alone, so that every index can be compared."""

    def forward(self, metric: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plan = match(metric, 30, num_prefix_tokens=1)
        return plan.keep, plan.src, plan.dst, plan.target()


@pytest.fixture(scope="session")
def plan_session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    file = tmp_path_factory.mktemp("onnx") / "plan.onnx"
    shapes = {"metric": {0: Dim("batch", min=1)}}
    program = torch.export.export(Plan(), (torch.randn(2, 197, 4),), dynamic_shapes=shapes)
    export.to_onnx(program, 20, ["metric"], ["keep", "src", "dst", "target"]).save(file)
    return open_onnx(file)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 8))
def test_ties_go_to_the_earlier_token_in_a_file_too(
    plan_session: Session, seed: int, batch_size: int, kinds: int
) -> None:
    # Vectors of plus and minus one have cosines that are exact in float32: few kinds of them tie all over.
    generator = torch.Generator().manual_seed(seed)
    vectors = 2.0 * torch.randint(2, (kinds, 4), generator=generator) - 1
    metric = vectors[torch.randint(kinds, (batch_size, 197), generator=generator)]
    expected = Plan()(metric)
    for got, rows in zip(plan_session.run(None, {"metric": metric.numpy()}), expected, strict=True):
        np.testing.assert_array_equal(got, rows.numpy())


def test_equal_patches_are_answered_alike(build: Build, tmp_path: Path) -> None:
    merged = wrap(build("vit_medium_patch16_gap_240", depth=1, pos_embed="none"))
    export_onnx(merged, 7, SIZE, tmp_path / "model.onnx")
    images = torch.randn(3, 3, 1, 1).expand(3, 3, *SIZE).contiguous()
    assert_same_answers(onnx_answers(open_onnx(tmp_path / "model.onnx"), images), merged(images))


class Refusal(NamedTuple):
    """A call that is refused, and what the message names."""

    change: Callable[[MergedViT], object]
    file: str
    options: dict[str, Any]
    message: str


def nothing(merged: MergedViT) -> None:
    pass


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(nn.Module.train, "model.onnx", {}, "training mode"),
        Refusal(nn.Module.half, "model.onnx", {}, "torch.float16"),
        Refusal(nothing, "model.onnx", {"opset": 17}, "opset is 17; it must lie between 18 and 22"),
        Refusal(nothing, "model.onnx", {"opset": 23}, "opset is 23"),
        Refusal(nothing, "missing/model.onnx", {}, "missing/model.onnx cannot be written: no such folder"),
        Refusal(nothing, ".", {}, "it is a folder"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(merged: MergedViT, refusal: Refusal, tmp_path: Path) -> None:
    refusal.change(merged)
    with pytest.raises(ExportError, match=refusal.message):
        export_onnx(merged, 4, SIZE, tmp_path / refusal.file, **refusal.options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(
    merged: MergedViT, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"the package {package}.*tome-server\[export\]"):
        export_onnx(merged, 4, SIZE, tmp_path / "model.onnx")


def test_without_onnxruntime_nothing_is_compared(
    merged: MergedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    written = export_onnx(merged, 4, SIZE, tmp_path / "model.onnx")
    assert written.difference is None
    assert written.path.exists()


def test_a_file_that_computes_something_else_is_not_left_behind(
    merged: MergedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("what was there")
    right = export._stable_sort
    monkeypatch.setattr(export, "_stable_sort", lambda values, **options: right(values))
    with pytest.raises(ExportError, match="onnxruntime's logits differ from torch's by"):
        export_onnx(merged, 4, SIZE, file)
    assert file.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [file]


def test_weights_too_large_for_one_file_lie_beside_it(
    merged: MergedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ONNXProgram.save

    def as_if_large(self: ONNXProgram, destination: Path, *, external_data: bool) -> None:
        assert not external_data
        save(self, destination, external_data=True)

    monkeypatch.setattr(ONNXProgram, "save", as_if_large)
    (tmp_path / "model.onnx.data").write_text("of an older file")
    written = export_onnx(merged, 4, SIZE, tmp_path / "model.onnx")
    files: Sequence[Path] = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert written.num_bytes == sum(file.stat().st_size for file in files)
    images = torch.randn(2, 3, *SIZE)
    assert_same_answers(onnx_answers(open_onnx(written.path), images), merged(images, 4))
