"""Rotary tables where timm makes them on the host, which a recorded graph cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tome_core
from tome_core.families import rope


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_a_recording_takes_the_table_of_the_call_before(build: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, images = tome_core.wrap(build(name), "fused"), torch.randn(2, 3, 96, 96)
    before = fused(images, 5)
    embedding: Any = fused.model.rope
    asked: list[object] = []

    def get_embed(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(args)
        table: Tensor = type(embedding).get_embed(embedding, *args, **kwargs)
        return table

    monkeypatch.setattr(embedding, "get_embed", get_embed)
    monkeypatch.setattr(rope, "is_recorded", lambda patches: True)
    assert torch.equal(fused(images, 5), before)
    learnt = next(embedding.parameters(), None) is not None
    assert bool(asked) == learnt  # a table that is learnt is part of the graph: it follows its weights


@torch.no_grad()
def test_a_recording_of_another_size_asks_for_its_own_table(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = tome_core.wrap(build("vit_small_patch16_dinov3"), "fused")
    wide, square = torch.randn(2, 3, 96, 128), torch.randn(2, 3, 96, 96)
    wanted = fused(wide, 5)
    fused(square, 5)
    monkeypatch.setattr(rope, "is_recorded", lambda patches: True)
    assert torch.equal(fused(wide, 5), wanted)
