"""A model at one `r`, recorded: the model itself where nothing can be recorded, its replay on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.core.recording import Calls
from tome_core import Recorded, wrap


@torch.no_grad()
def test_without_a_gpu_it_is_the_model(build: Any) -> None:
    merged, images = wrap(build()), torch.randn(2, 3, 96, 96)
    assert torch.equal(Recorded(merged, [5, 3])(images), merged(images, [5, 3]))
    with pytest.raises(ValueError, match="-1"):
        Recorded(merged, -1)


@torch.no_grad()
def test_each_shape_is_recorded_once_and_answers_are_kept(build: Any, recorder: Calls) -> None:
    merged = wrap(build())
    fast, batches = Recorded(merged, 5), [torch.randn(n, 3, 96, 96) for n in (2, 3, 2, 2)]
    answers = [fast(batch) for batch in batches]
    assert recorder.shapes == [(2, 10), (3, 10)]
    for answer, batch in zip(answers, batches, strict=True):  # the first is not overwritten by the last
        torch.testing.assert_close(answer, merged(batch, 5))
    assert batches[0].data_ptr() != batches[2].data_ptr()


@torch.no_grad()
def test_the_shape_unused_for_longest_goes(build: Any, recorder: Calls) -> None:
    fast = Recorded(wrap(build()), 5, max_shapes=2)
    for n in (1, 2, 1, 3, 1, 2):
        fast(torch.randn(n, 3, 96, 96))
    assert [shape[0] for shape in recorder.shapes] == [1, 2, 3, 2]


def test_threads_take_turns(build: Any, recorder: Calls) -> None:
    merged = wrap(build())
    fast, batches = Recorded(merged, 5), [torch.randn(2, 3, 96, 96) for _ in range(12)]

    @torch.no_grad()
    def answer(batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = fast(batch)
        return logits

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for logits, batch in zip(pool.map(answer, batches), batches, strict=True):
            torch.testing.assert_close(logits, merged(batch, 5))


def test_a_recording_serves_whichever_mode(build: Any, recorder: Calls) -> None:
    merged, images = wrap(build()), torch.randn(2, 3, 96, 96)
    fast = Recorded(merged, 5)
    with torch.inference_mode():
        first = fast(images)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), first)
    assert len(recorder.shapes) == 1


@torch.no_grad()
def test_hooks_and_training_are_not_replayed_away(build: Any, recorder: Calls) -> None:
    merged, images, calls = wrap(build(), "fused"), torch.randn(2, 3, 96, 96), []
    fast = Recorded(merged, 5)
    fast(images)
    model: Any = merged.model
    handle = model.norm.register_forward_hook(lambda *_: calls.append(1))
    fast(images)
    assert calls
    handle.remove()
    fast.train()
    fast(images)
    assert len(recorder.shapes) == 2  # in training mode nothing is recorded


def test_gradients_are_the_models_own(build: Any, recorder: Calls) -> None:
    model = build()
    Recorded(wrap(model), 5)(torch.randn(2, 3, 96, 96)).sum().backward()
    assert not recorder.shapes and model.head.weight.grad is not None


@pytest.mark.gpu
@torch.inference_mode()
def test_a_graph_answers_as_the_model_does(build: Any) -> None:
    merged = wrap(build(embed_dim=192).cuda().bfloat16())
    fast = Recorded(merged, 5)
    for n in (2, 8, 2):
        images = torch.randn(n, 3, 96, 96, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(fast(images), merged(images, 5), rtol=0.05, atol=0.05)
