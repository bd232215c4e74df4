"""When a learning judges, when it ends, what it keeps, and that it goes on after a stop as it would have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.errors import EngineError
from server.tuning import learning
from server.tuning.learning import GLANCES, PATIENCE, Learning, Progress
from tests.server.conftest import SIDE, model_info
from tome_core.tuning import Recipe

STEPS, BAND = 60, (3, 6)
STEP_S, GLANCE_S = 1.0, 2.0
PHOTOS = torch.randint(256, (9, 3, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

Of = Callable[[int], float]
"""A number of a step, counted from 1."""


@dataclass
class Fake:
    """A tuner and its judge: what they say is a function of the step. It notes what it is asked, by its own clock."""

    loss: Of = lambda step: 1 / step
    nats: Of = lambda step: 1 / step
    recipe: Recipe = field(default_factory=lambda: Recipe(steps=STEPS, batch_size=4))
    asked: list[tuple[Tensor, int, float]] = field(default_factory=list)
    judged: list[tuple[int, int]] = field(default_factory=list)
    now: float = 0.0
    glance_s: float = GLANCE_S
    step_number: int = 0

    def step(self, images: Tensor, r: int, share: float) -> Tensor:
        self.asked.append((images, r, share))
        self.step_number += 1
        self.now += STEP_S
        return torch.tensor(self.loss(self.step_number))

    def numbers(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step_number)}

    def glance(self, r: int) -> tuple[float, float]:
        self.judged.append((self.step_number, r))
        self.now += self.glance_s
        return self.nats(self.step_number), 0.5


@dataclass
class Learned:
    """A learning that has ended, and what it told on the way."""

    progress: Progress
    shares: list[float]
    kept: list[int]


@pytest.fixture
def learn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Learned]:
    def learn(
        fake: Fake, longest_s: float = math.inf, stop_after: int | None = None, progress: Progress | None = None
    ) -> Learned:
        monkeypatch.setattr(learning, "time", SimpleNamespace(perf_counter=lambda: fake.now))
        one: Any = fake
        learned = Learned(progress or Progress(), [], [])
        run = Learning(one, one, PHOTOS, model_info().preprocessing, BAND, longest_s, learned.progress)
        run.run(
            lambda progress, share: learned.shares.append(share),
            lambda progress: learned.kept.append(progress.step),
            lambda: fake.step_number == stop_after,
        )
        return learned

    return learn


Learn = Callable[..., Learned]


def test_all_steps_are_learned_from_and_judged_now_and_then(learn: Learn) -> None:
    fake = Fake()
    learned = learn(fake)
    progress = learned.progress
    assert progress.step == len(fake.asked) == len(learned.shares) == STEPS
    assert learned.shares == [step / STEPS for step in range(1, STEPS + 1)]
    assert [share for *_, share in fake.asked] == [step / STEPS for step in range(STEPS)]
    steps = [step for step, _ in fake.judged]
    assert progress.glances == len(steps) == GLANCES and steps[-1] == STEPS
    assert steps == learned.kept == list(range(4, STEPS + 1, 4))
    assert {r for _, r in fake.judged} == {4}
    assert progress.seconds == STEPS * STEP_S + GLANCES * GLANCE_S
    assert progress.loss == pytest.approx(sum(1 / step for step in range(57, 61)) / 4)
    assert (progress.best, progress.agreement, progress.idle) == (1 / STEPS, 0.5, 0)
    assert int(progress.numbers["step"]) == STEPS


def test_what_is_learned_from(learn: Learn) -> None:
    fake = Fake()
    learn(fake)
    assert {r for _, r, _ in fake.asked} == set(range(BAND[0], BAND[1] + 1))
    for images, *_ in fake.asked:
        assert images.shape == (4, 3, SIDE, SIDE) and images.dtype == torch.float32
        assert -1.001 < images.min() < -0.5 and 0.5 < images.max() < 1.001  # a mean and a deviation of a half
    assert len({float(images.sum()) for images, *_ in fake.asked}) == STEPS


def test_the_time_is_a_limit_and_the_pace_goes_by_it(learn: Learn) -> None:
    fake = Fake()
    learned = learn(fake, longest_s=30.0)
    assert learned.progress.step < STEPS and 30 <= learned.progress.seconds <= 30 + STEP_S + GLANCE_S
    assert learned.shares == sorted(learned.shares) and learned.shares[-1] == 1
    assert fake.judged[-1][0] == learned.progress.step == learned.kept[-1]
    assert [share for *_, share in fake.asked] == [0.0, *learned.shares[:-1]]


def test_a_part_of_the_time_lies_between_two_glances_however_long_they_take(learn: Learn) -> None:
    fake = Fake()
    fake.glance_s = 4.0  # of 60: nearly the share after which is judged again
    learned = learn(fake, longest_s=60.0)
    assert learned.progress.step * STEP_S >= learned.progress.glances * fake.glance_s


def test_one_step_that_takes_all_the_time_is_judged(learn: Learn) -> None:
    learned = learn(Fake(), longest_s=0.1)
    assert (learned.progress.step, learned.progress.glances, learned.kept, learned.shares) == (1, 1, [1], [1.0])
    assert int(learned.progress.numbers["step"]) == 1


def test_it_ends_where_nothing_better_is_expected_and_the_best_is_kept(learn: Learn) -> None:
    fake = Fake(nats=lambda step: abs(step - 21))
    learned = learn(fake)
    assert int(learned.progress.numbers["step"]) == 20 and learned.progress.best == 1
    assert learned.progress.step == 20 + 4 * PATIENCE < STEPS
    assert learned.progress.idle == PATIENCE


def test_a_stop_is_judged_and_kept_at_once(learn: Learn) -> None:
    fake = Fake()
    learned = learn(fake, stop_after=6)
    assert learned.progress.step == len(learned.shares) == 6
    assert [step for step, _ in fake.judged] == learned.kept == [4, 6]
    assert int(learned.progress.numbers["step"]) == 6


def test_after_a_stop_it_goes_on_as_it_would_have(learn: Learn) -> None:
    whole, parted = Fake(), Fake()
    learn(whole)
    first = learn(parted, stop_after=7)
    parted.now += 1000  # nobody counts the time in between
    second = learn(parted, progress=first.progress)
    assert second.progress.step == STEPS
    assert second.progress.seconds == STEPS * STEP_S + len(parted.judged) * GLANCE_S
    for (images, r, share), (others, other_r, other_share) in zip(whole.asked, parted.asked, strict=True):
        assert torch.equal(images, others) and (r, share) == (other_r, other_share)


@pytest.mark.parametrize("longest_s", [math.inf, 5.0])
def test_a_learning_that_was_at_its_end_learns_no_more(learn: Learn, longest_s: float) -> None:
    fake = Fake()
    done = learn(fake, longest_s).progress
    asked, judged = len(fake.asked), len(fake.judged)
    assert learn(fake, longest_s, progress=done).progress.step == asked
    assert (len(fake.asked), len(fake.judged)) == (asked, judged)


@pytest.mark.parametrize("of", ["loss", "nats"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_it_and_what_was_kept_stays(learn: Learn, of: str, number: float) -> None:
    fake = Fake()
    setattr(fake, of, lambda step: number if step >= 8 else 1 / step)
    progress = Progress()
    with pytest.raises(EngineError, match=f"the loss is {number} near step 8: this model cannot be tuned"):
        learn(fake, progress=progress)
    assert int(progress.numbers["step"]) == 4 and progress.best == 1 / 4
