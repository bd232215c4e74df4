"""The check of every name on a device: what it passes, what it must not pass, and the matching that it replays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks import coverage, precision
from benchmarks.coverage import examine_on, randomise
from benchmarks.same_matching import recorded, replayed
from tome_core import MergedViT, wrap
from tome_core.attention import size_bias

VIT, ROTARY, RELATIVE = "vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224", "vit_relpos_medium_patch16_224"
REFUSED = "swin_tiny_patch4_window7_224"
Forward = Callable[..., Tensor]


def alter(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Changes what merging models answer in bfloat16 where they merge."""
    forward: Forward = MergedViT.forward

    def altered(self: MergedViT, images: Tensor, r: Any = 0) -> Tensor:
        logits = forward(self, images, r)
        return change(logits) if r and images.dtype == torch.bfloat16 else logits

    monkeypatch.setattr(MergedViT, "forward", altered)


def crash(logits: Tensor) -> Tensor:
    raise RuntimeError("expected scalar type BFloat16 but found Float\nmore of it")


def coverage_of(
    names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[list[str], dict[str, Any]]:
    """The lines that the program prints, and what the last one holds."""
    monkeypatch.setattr(timm, "list_models", lambda pattern: names)
    monkeypatch.setattr("sys.argv", ["coverage", *arguments])
    coverage.main()
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_right_models_pass_in_any_precision(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [VIT, ROTARY, RELATIVE, REFUSED]
    lines, summary = coverage_of(names, monkeypatch, capsys, "--device", "cpu", "--dtype", dtype)
    fused = summary.pop("fused")
    assert 1 <= fused <= 3
    assert f"{fused} ran fused, {3 - fused} plain" in lines
    assert summary == {
        "names": 4,
        "supported": 3,
        "equal_at_r0": 3,
        "merged": 3,
        "refused": 1,
        "crashed": 0,
        "wrong": 0,
        "device": "cpu",
        "dtype": dtype,
    }


def test_without_a_device_the_models_are_compared_with_timms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, summary = coverage_of([VIT, REFUSED], monkeypatch, capsys)
    assert lines[:-1] == [
        "class                            supported  refused  wrong",
        "VisionTransformer                        1        0      0",
        "all other classes                        0        1      0",
    ]
    counts = {"names": 2, "supported": 1, "equal_at_r0": 1, "merged": 1, "refused": 1, "crashed": 0, "wrong": 0}
    assert summary == counts


def test_a_model_that_raises_is_crashed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    alter(monkeypatch, crash)
    lines, summary = coverage_of([VIT], monkeypatch, capsys, "--dtype", "bf16")
    counts = [summary[key] for key in ("supported", "equal_at_r0", "merged", "refused", "crashed", "wrong")]
    assert counts == [0, 1, 0, 0, 1, 0]
    said = f"crashed: {VIT}: r=12: RuntimeError: expected scalar type BFloat16 but found Float ({Path(__file__).name}:"
    assert [line.startswith(said) for line in lines].count(True) == 1


@pytest.mark.parametrize(
    "change",
    [lambda logits: logits * 1.05, lambda logits: logits * torch.nan, lambda logits: logits.flip(0)],
    ids=["5 % too large", "not a number", "answers in another order"],
)
@pytest.mark.parametrize("name", [VIT, RELATIVE])
def test_a_model_that_answers_otherwise_is_wrong(
    name: str, change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alter(monkeypatch, change)
    lines, summary = coverage_of([name], monkeypatch, capsys, "--dtype", "bf16")
    counts = [summary[key] for key in ("supported", "equal_at_r0", "merged", "refused", "crashed", "wrong")]
    assert counts == [0, 1, 0, 0, 0, 1]
    (line,) = (line for line in lines if line.startswith(f"wrong: {name}: r=12: logits differ by "))
    assert "; timm's own model loses " in line


def test_attention_that_forgets_sizes_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if dtype == torch.float16 else size_bias(size, dtype)

    monkeypatch.setattr("tome_core.attention.size_bias", forgetful)
    verdict = examine_on(ROTARY, "cpu", "fp16")
    assert (verdict.equal, verdict.merged, verdict.crashed) == (True, False, False)


@pytest.mark.parametrize("change", [lambda logits: logits, lambda logits: logits * 1.05])
def test_where_timms_own_model_cannot_run_ours_is_still_examined(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = coverage.build

    def refuse(model: nn.Module, images: tuple[Tensor]) -> None:
        if images[0].dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")

    def built(name: str) -> tuple[nn.Module, int]:
        model, side = build(name)
        model.register_forward_pre_hook(refuse)  # called by timm's forward, not by ours
        return model, side

    monkeypatch.setattr(coverage, "build", built)
    alter(monkeypatch, change)
    verdict = examine_on(VIT, "cpu", "bf16")
    right = change(torch.ones(())).item() == 1
    assert (verdict.equal, verdict.merged, verdict.crashed) == (True, right, False)
    assert right or verdict.reason.endswith("; timm's own model cannot run")


def test_a_name_of_which_float32_merges_otherwise_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Forward = MergedViT.forward

    def shy(self: MergedViT, images: Tensor, r: Any = 0) -> Tensor:
        return forward(self, images, r - 1 if r and images.dtype == torch.float32 else r)

    monkeypatch.setattr(MergedViT, "forward", shy)
    verdict = examine_on(VIT, "cpu", "bf16")
    assert (verdict.equal, verdict.merged, verdict.crashed) == (True, False, False)
    assert "images, tokens and r are (2, 50, 11); the recorded ones are (2, 50, 12)" in verdict.reason


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    built: nn.Module = timm.create_model(VIT, **small).eval()
    randomise(built)
    return built


@torch.inference_mode()
def test_what_merged_in_one_model_merges_again_in_another_of_either_kind(model: nn.Module) -> None:
    mine, others = torch.randn(2, 2, 3, 64, 64)
    kinds = [wrap(model, "fused"), wrap(model, "plain")]
    for noted in kinds:
        with recorded() as plans:
            first = noted(mine, 3)
        assert [plan.src.shape for plan in plans] == [(2, 3), (2, 3)]  # the last block merges nothing
        with recorded() as of_others:
            noted(others, 3)
        for again in kinds:
            with replayed(plans):
                torch.testing.assert_close(again(mine, 3), first, rtol=1e-5, atol=1e-5)
            with replayed(of_others):
                assert (again(mine, 3) - first).abs().max() > 1e-3
        with replayed(plans):
            assert torch.equal(noted(mine, 3), first)


@torch.inference_mode()
@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_what_merged_is_not_replayed_where_it_does_not_fit(model: nn.Module, kernels: Any) -> None:
    images = torch.randn(2, 3, 64, 64)
    merged = wrap(model, kernels)
    with recorded() as plans:
        merged(images, 3)
    with pytest.raises(ValueError, match="2 of 2 recorded blocks did not merge"), replayed(plans):
        merged(images, 0)
    with pytest.raises(ValueError, match="one more block merges than the 1 that were recorded"), replayed(plans[:1]):
        merged(images, 3)
    with pytest.raises(ValueError, match=r"are \(2, 17, 2\); the recorded ones are \(2, 17, 3\)"), replayed(plans):
        merged(images, 2)
    with pytest.raises(ValueError, match=r"are \(1, 17, 3\); the recorded ones are \(2, 17, 3\)"), replayed(plans):
        merged(images[:1], 3)


def test_the_error_of_half_precision_is_measured_under_the_same_matching(model: nn.Module) -> None:
    rows = list(precision.measure(model, torch.randn(4, 3, 64, 64), [0, 4, 8], torch.bfloat16))
    assert [(row["impl"], row["r"]) for row in rows] == [("timm", 0), ("ours", 0), ("ours", 4), ("ours", 8)]
    assert all(1e-4 < row["error"] < 0.02 for row in rows)
