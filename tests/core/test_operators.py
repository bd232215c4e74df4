"""Fused operations as torch operators: what they say of themselves, compiled and exported in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tome_core
from tome_core import FixedR, kernels
from tome_core.kernels import FLOAT8

Build = Callable[..., Any]
ops = torch.ops.tome

x, y = torch.randn(2, 9, 64), torch.randn(2, 9, 64)
q, k, v = torch.randn(2, 9, 192).split(64, dim=-1)
vector, log_size, sizes, metric = torch.randn(64), torch.zeros(2, 9), torch.ones(2, 9), torch.randn(2, 9, 32)
bias = (torch.randn(2, 20), *(torch.randint(0, 10, (2, 9), dtype=torch.int32) for _ in range(2)))
pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
groups = kernels.match(metric, 3, 1)
a8, weight8 = torch.randn(2, 9, 32).to(FLOAT8), torch.randn(64, 32).to(FLOAT8)
norm = (vector, vector, 1e-6, True)
nothing = (None, None, None)

CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attend": ("attend", (q, k, v, None, *nothing, 2)),
    "attend biased, few queries": ("attend", (q[:, :1].contiguous(), k, v, log_size, *bias, 2)),
    "attend_match": ("attend_match", (q, k, v, None, *nothing, None, 2, 3, 1)),
    "attend_match by a metric": ("attend_match", (q, k, v, log_size, *bias, metric, 2, 3, 1)),
    "metric": ("metric", (k, 2)),
    "rotate": ("rotate", (q, k, torch.randn(1, 9, 64), None, 2, False)),
    "rotate a table a head": ("rotate", (q[:, :2].contiguous(), k, torch.randn(2, 9, 128), sizes, 2, True)),
    "match": ("match", (metric, 3, 1)),
    "norm": ("norm", (x, None, *norm, torch.float32, 1.0)),
    "add_norm": ("add_norm", (x, y, vector, vector, *norm, torch.float32, 1.0)),
    "add_norm on a table": ("add_norm", (x[:1], y[:, :8].bfloat16(), None, None, *norm, torch.bfloat16, 1.0)),
    "merge_add_norm": ("merge_add_norm", (*groups, x, y, sizes, vector, vector, *norm, torch.float32, 1.0)),
    "merge_add_norm alone": ("merge_add_norm", (*groups, x, *nothing, None, *norm, torch.float32, 1.0)),
    "merge_sums": ("merge_sums", (*groups, torch.randn(1, 9, 7))),
    "cut": ("cut", (torch.randn(2, 3, 32, 48), 16, torch.bfloat16)),
    "cut pixels": ("cut", (pixels, 16, torch.float32)),
    "cut one patch": ("cut", (torch.randn(1, 3, 16, 16), 16, torch.float32)),
    "linear_gelu8": ("linear_gelu8", (a8, weight8, vector, 0.1, 2.0)),
    "accumulate8": ("accumulate8", (x.clone(), a8, weight8, vector, vector, 0.1)),
}


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("operator", "args"), CALLS.values(), ids=CALLS)
def test_operators_are_what_they_say(operator: str, args: tuple[Any, ...]) -> None:
    # The check of the schema compares clones by arithmetic that torch has not for float8.
    schema = () if operator.endswith("8") else ("test_schema",)
    kinds = (*schema, "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, operator).default, args, test_utils=kinds)


def test_every_operator_is_checked() -> None:
    made = {name for name in kernels.__all__ if hasattr(ops, name)}
    assert made == {operator for operator, _ in CALLS.values()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_compiles_and_exports_in_one_piece(build: Build, name: str) -> None:
    model, images = build(name), torch.randn(2, 3, 96, 96)
    fixed = FixedR(tome_core.wrap(model, "fused"), 5)
    wanted = tome_core.wrap(model, "plain")(images, 5)
    close(torch.compile(fixed, fullgraph=True, backend="aot_eager")(images), wanted)
    program = torch.export.export(fixed, (images,))
    close(program.module()(images), wanted)
    called = {str(node.target) for node in program.graph.nodes}
    assert {"tome.cut.default", "tome.attend_match.default", "tome.merge_add_norm.default"} <= called
    assert ("tome.rotate.default" in called) == ("dinov3" in name)
    portable = tome_core.export_program(fixed.merged, 5, (96, 96))
    assert not any("tome" in str(node.target) for node in portable.graph.nodes)  # needs none of this code


@torch.no_grad()
def test_compiles_with_weights_that_change(build: Build) -> None:
    model, images = build(depth=1), torch.randn(2, 3, 96, 96)
    compiled = torch.compile(FixedR(tome_core.wrap(model, "fused"), 5), fullgraph=True, backend="aot_eager")
    compiled(images)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    close(compiled(images), tome_core.wrap(model, "plain")(images, 5))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size"), [("beit_base_patch16_224", (64, 80)), ("vit_relpos_small_patch16_224", (80, 48))]
)
def test_an_export_leaves_nothing_behind(build: Build, name: str, size: tuple[int, int]) -> None:
    """What is kept between calls, here of a grid that no other test has, holds no tensors of a trace."""
    model, images = build(name, depth=1, img_size=size), torch.randn(2, 3, *size)
    fused = tome_core.wrap(model, "fused")
    program = torch.export.export(FixedR(fused, 5), (images,))
    wanted = tome_core.wrap(model, "plain")(images, 5)
    assert type(fused(images, 5)) is Tensor
    close(fused(images, 5), wanted)
    close(program.module()(images), wanted)


@torch.no_grad()
def test_a_model_of_pixels_exports(build: Build) -> None:
    model, pixels = build(depth=1), torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    fused = tome_core.wrap(model, "fused").from_pixels((0.41, 0.42, 0.43), (0.21, 0.22, 0.23))
    program = torch.export.export(FixedR(fused, 5), (pixels,))
    assert type(fused(pixels, 5)) is Tensor
    close(program.module()(pixels), fused(pixels, 5))


def test_what_inference_mode_kept_meets_gradients(build: Build) -> None:
    model, pixels = build(depth=1), torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    merged = tome_core.wrap(model, "fused").from_pixels((0.31, 0.32, 0.33), (0.24, 0.25, 0.26))
    with torch.inference_mode():
        merged(pixels, 5)
    merged(pixels, 5).sum().backward()
    assert model.head.weight.grad is not None
