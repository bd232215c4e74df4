"""Training through merges: gradients are those of the arithmetic, and reach every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tome_core import match, merge, wrap
from tome_core.attention import proportional_attention
from tome_core.matching import MergePlan

Build = Callable[..., Any]


@pytest.mark.parametrize("r", [1, 4])
def test_merging_has_the_gradients_of_a_weighted_mean(r: int) -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    plan = match(torch.randn(2, 9, 4), r, 1)
    size = torch.randint(1, 5, (2, 9)).float()

    def mean(x: Tensor) -> Tensor:
        return merge(plan, x, size)[0]

    assert torch.autograd.gradcheck(mean, (x,))


def test_proportional_attention_has_its_gradients() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 3, dtype=torch.float64).unbind(0)
    size = torch.randint(1, 5, (1, 5)).float()
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    inputs = tuple(t.clone().requires_grad_() for t in (q, k, v, bias))
    assert torch.autograd.gradcheck(lambda q, k, v, bias: proportional_attention(q, k, v, size, bias), inputs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_relpos_small_patch16_224"])
def test_a_whole_model_has_its_gradients(build: Build, name: str) -> None:
    """By finite differences in float64: matching is piecewise constant, so that small steps keep the plan."""
    model = build(name, depth=2, embed_dim=24, num_heads=2, num_classes=2).double()
    merged = wrap(model)
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    logits = merged(images, 5)[0]
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    direction = torch.randn_like(images)
    with torch.no_grad():
        step = 1e-6
        change = (merged(images + step * direction, 5) - merged(images - step * direction, 5)).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-5, atol=1e-6)


def test_every_parameter_learns_under_merging(build: Build) -> None:
    model = build("vit_small_patch16_dinov3").train()
    wrap(model)(torch.randn(2, 3, 96, 96), [8, 0, 8]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_plan_is_no_part_of_the_graph() -> None:
    plan: MergePlan = match(torch.randn(1, 8, 4, requires_grad=True), 2)
    assert not any(index.requires_grad for index in plan)
