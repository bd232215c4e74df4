"""A model at one `r` is the model at that `r`, and any number of them compile in one process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tome_core import FixedR, MergedViT, Ramp, wrap
from tome_core.schedule import RLike

Build = Callable[..., VisionTransformer]


@pytest.fixture
def merged(build: Build) -> MergedViT:
    return wrap(build(depth=2))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("r", [0, 4, [5], [0, 7], 1000, Ramp(6)])
def test_it_is_the_model_at_that_r(merged: MergedViT, r: RLike) -> None:
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(FixedR(merged, r)(images), merged(images, r))


@pytest.mark.parametrize(("r", "error"), [(-1, ValueError), ([1, 1, 1], ValueError), ("4", TypeError)])
def test_a_wrong_r_is_refused_when_it_is_fixed(merged: MergedViT, r: RLike, error: type[Exception]) -> None:
    with pytest.raises(error):
        FixedR(merged, r)


@pytest.mark.parametrize("training", [True, False])
def test_it_shares_the_weights_and_keeps_the_mode(merged: MergedViT, training: bool) -> None:
    merged.train(training)
    fixed = FixedR(merged, 4)
    assert fixed.training == merged.training == training
    for ours, theirs in zip(fixed.parameters(), merged.parameters(), strict=True):
        assert ours is theirs


def test_copies_and_pickles_stand_on_their_own(merged: MergedViT) -> None:
    images = torch.randn(2, 3, 96, 96)
    fixed = FixedR(merged, 4)
    expected = fixed(images)
    copies = [copy.deepcopy(fixed), pickle.loads(pickle.dumps(fixed))]
    for parameter in merged.parameters():
        torch.nn.init.zeros_(parameter)
    assert not torch.equal(fixed(images), expected)
    for each in copies:
        assert torch.equal(each(images), expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_twelve_r_compile_whole_in_one_process(build: Build) -> None:
    merged, images = wrap(build("vit_medium_patch16_gap_240", depth=1)), torch.randn(2, 3, 96, 96)
    for r in range(12):  # of one code object, torch would refuse the ninth
        compiled = torch.compile(FixedR(merged, r), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), merged(images, r))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_r_takes_any_batch(build: Build) -> None:
    merged = wrap(build("vit_medium_patch16_gap_240", depth=1))
    compiled = torch.compile(FixedR(merged, 4), fullgraph=True, backend="eager")
    for batch_size in (2, 1, 3, 8):
        images = torch.randn(batch_size, 3, 96, 96)
        torch.testing.assert_close(compiled(images), merged(images, 4))
