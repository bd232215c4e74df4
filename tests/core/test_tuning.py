"""Tuning: in every family the loss falls and the model stays as it is; a learning goes on as if it had not stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.core.variants import Case
from tome_core import MergedViT, wrap
from tome_core.tuned import Band, Tuned, fingerprints, tunable
from tome_core.tuning import Recipe, Tuner, divergence, pace

R = 8
SHARES = st.floats(0, 1)


@pytest.fixture
def merged(build: Callable[..., Any]) -> MergedViT:
    return wrap(build(depth=2, img_size=48))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 48, 48)


def learned(tuner: Tuner, images: Tensor, steps: range) -> list[float]:
    """The losses of some steps at changing `r`, in the middle of a learning."""
    return [float(tuner.step(images, 2 + step % 3, 0.3)) for step in steps]


def test_every_family_learns_and_stays_as_it_is(case: Case) -> None:
    own = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in case.model.named_parameters()}
    with torch.no_grad():
        unmerged, merged = case.merged(case.images, 0), case.merged(case.images, R)

    tuner = Tuner(case.merged, Recipe(learning_rate=2e-3))
    losses = [float(tuner.step(case.images, R, 0.3)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(4 * float(divergence(merged / 2, unmerged / 2)), rel=1e-3, abs=1e-6)

    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    for name, parameter in case.model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad is asked[name], name
    numbers = tuner.numbers()
    assert numbers.keys() == tunable(case.model, case.merged.family).keys()
    assert any(not torch.equal(number, own[name]) for name, number in numbers.items())
    tuned = Tuned([Band(R, R, numbers)], fingerprints(case.model), {})
    tuned.check(case.model, case.merged.family)
    case.merged.take_tuned(tuned)
    with torch.no_grad():
        assert torch.equal(case.merged(case.images, 0), unmerged)
        assert not torch.equal(case.merged(case.images, R), merged)
        torch.testing.assert_close(tuner.answers(case.images, R), case.merged(case.images, R).float())
        torch.testing.assert_close(tuner.answers(case.images, R, tuned=False), merged.float())


def test_every_number_has_a_gradient(merged: MergedViT, images: Tensor) -> None:
    """No norm or bias is left out by mistake."""
    tuner, before = Tuner(merged), Tuner(merged).numbers()
    learned(tuner, images, range(2))
    still = [name for name, number in tuner.numbers().items() if torch.equal(number, before[name])]
    assert not still


def test_a_model_that_was_tuned_learns_from_its_own_numbers(merged: MergedViT, images: Tensor) -> None:
    own, before = Tuner(merged), Tuner(merged).answers(images, 4)
    learned(own, images, range(2))
    merged.take_tuned(Tuned([Band(1, 8, own.numbers())], fingerprints(merged.model), {}))
    again = Tuner(merged)
    assert merged.tuned is not None
    assert torch.equal(again.answers(images, 4), before)
    assert torch.equal(again.answers(images, 4, tuned=False), before)
    for name, parameter in tunable(merged.model, merged.family).items():
        assert torch.equal(again.numbers()[name], parameter)


def test_only_what_is_named_learns(merged: MergedViT, images: Tensor) -> None:
    names = ["cls_token", "blocks.1.attn.qkv.weight"]
    tuner = Tuner(merged, names=names)
    losses = learned(tuner, images, range(0, 12, 3))
    assert losses[-1] < losses[0]
    own = dict(merged.model.named_parameters())
    assert list(tuner.numbers()) == names
    assert all(not torch.equal(number, own[name]) for name, number in tuner.numbers().items())


def test_a_learning_that_was_stopped_goes_on_as_if_it_had_not(merged: MergedViT, images: Tensor) -> None:
    whole, first, second = Tuner(merged), Tuner(merged), Tuner(merged)
    losses = learned(whole, images, range(6))
    losses_before = learned(first, images, range(3))
    state = first.state()
    learned(first, images, range(3, 5))  # the state is a copy
    second.resume(state)
    assert losses_before + learned(second, images, range(3, 6)) == losses
    assert all(torch.equal(number, whole.numbers()[name]) for name, number in second.numbers().items())


def test_numbers_that_were_taken_are_answered_by(merged: MergedViT, images: Tensor) -> None:
    tuner = Tuner(merged)
    before, answers = tuner.numbers(), tuner.answers(images, 4)
    learned(tuner, images, range(3))
    assert not torch.equal(tuner.answers(images, 4), answers)
    tuner.take(before)
    assert torch.equal(tuner.answers(images, 4), answers)


def test_a_large_gradient_is_cut(merged: MergedViT, images: Tensor) -> None:
    whole, cut = Tuner(merged, Recipe(largest_gradient=1e6)), Tuner(merged, Recipe(largest_gradient=1e-3))
    norms = []
    for tuner in (whole, cut):
        learned(tuner, images, range(1))
        gradients = [number.grad for number in tuner._numbers.values() if number.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))
    assert norms[0] > 2e-3 and norms[1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("fails_at", ["_teacher", "_student"])
def test_a_batch_that_does_not_fit_goes_in_parts(
    merged: MergedViT, images: Tensor, fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(batch_size=4)
    whole, parted = Tuner(merged, recipe), Tuner(merged, recipe)
    model, asked = getattr(parted, fails_at), []

    def fits_two(images: Tensor, r: int) -> Tensor:
        asked.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError
        found: Tensor = model(images, r)
        return found

    monkeypatch.setattr(parted, fails_at, fits_two)
    losses = learned(whole, images, range(3)), learned(parted, images, range(3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the order of sums goes by the machine
    for name, number in parted._numbers.items():
        torch.testing.assert_close(number.grad, whole._numbers[name].grad, rtol=1e-2, atol=1e-5)
    assert asked == [4, 2, 2, 2, 2, 2, 2]


def test_an_image_that_does_not_fit_alone_is_an_error(
    merged: MergedViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = Tuner(merged, Recipe(batch_size=4))

    def fits_none(images: Tensor, r: int) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tuner, "_student", fits_none)
    with pytest.raises(torch.OutOfMemoryError):
        tuner.step(images, 2, 0.5)


def test_in_bfloat16_the_numbers_stay_float32(merged: MergedViT, images: Tensor) -> None:
    exact, rounded = Tuner(merged), Tuner(merged, autocast=torch.bfloat16)
    assert learned(rounded, images, range(1)) == pytest.approx(learned(exact, images, range(1)), rel=0.3)
    assert all(number.dtype == torch.float32 for number in rounded.numbers().values())
    assert rounded.answers(images, 2).dtype == torch.float32
    assert not torch.equal(rounded.answers(images, 0, tuned=False), exact.answers(images, 0, tuned=False))


@given(SHARES, SHARES, st.floats(0.01, 0.9))
def test_the_pace_rises_and_then_falls(one: float, other: float, warm_up: float) -> None:
    early, late = sorted((one, other))
    assert 0 <= pace(early, warm_up) <= 1
    if late < warm_up:
        assert pace(early, warm_up) <= pace(late, warm_up)
    if early >= warm_up:
        assert pace(early, warm_up) >= pace(late, warm_up)
    assert pace(warm_up, warm_up) == 1 and pace(1.0, warm_up) == pytest.approx(0, abs=1e-12)
    assert pace(0.0, warm_up) > 0  # the first step is not lost


@given(st.integers(0, 10_000), st.floats(0.01, 30), st.integers(1, 5), st.integers(1, 7))
def test_divergence(seed: int, scale: float, rows: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = scale * torch.randn(2, rows, classes, generator=generator)
    assert float(divergence(one, one + 3)) == pytest.approx(0, abs=1e-5)
    assert float(divergence(one, other)) >= -1e-5
    p, q = other.double().softmax(dim=1), one.double().softmax(dim=1)
    assert float(divergence(one, other)) == pytest.approx(
        float((p * (p.log() - q.log())).sum(dim=1).mean()), rel=1e-3, abs=1e-4
    )
