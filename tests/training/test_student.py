"""Loss, learning rate, random `r`, weight decay, the flat gradient, the running average."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tome_core
from training.loss import Answer, distance
from training.pace import LARGEST_R, WARM_UP, learning_rate, random_r
from training.parallel import clip_, flat_gradients
from training.student import Average, Student, backward_of, decay_groups


def answer(logits: torch.Tensor | None = None, features: torch.Tensor | None = None) -> Answer:
    return Answer(
        torch.randn(4, 10) if logits is None else logits, 3 + 2 * torch.randn(4, 6) if features is None else features
    )


def test_nothing_is_wrong_with_a_student_that_says_what_the_teacher_says() -> None:
    teacher = answer()
    student = Answer(teacher.logits + 5, F.layer_norm(teacher.features, (6,)))  # a constant changes no probability
    assert distance(student, teacher).item() == pytest.approx(0, abs=1e-6)


def test_the_distance_is_that_of_softened_probabilities_and_of_normalised_features() -> None:
    for _ in range(5):
        student, teacher = answer(), answer()
        log_p, log_q = (teacher.logits / 2).log_softmax(1), (student.logits / 2).log_softmax(1)
        logits = 4 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
        wanted = (teacher.features - teacher.features.mean(1, keepdim=True)) / teacher.features.std(
            1, keepdim=True, correction=0
        )
        features = (student.features - wanted).square().mean()
        torch.testing.assert_close(distance(student, teacher), logits + features)
        assert logits > 0 and features > 0


def test_random_r_takes_every_value_up_to_the_largest_and_most_often_none() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [random_r(generator) for _ in range(1000)]
    assert set(drawn) == set(range(LARGEST_R + 1))
    assert 200 < drawn.count(0) < 400
    assert max(drawn.count(r) for r in range(1, LARGEST_R + 1)) < 100
    generator.manual_seed(0)
    torch.rand(7)  # other draws do not matter
    assert [random_r(generator) for _ in range(1000)] == drawn


def test_the_learning_rate_warms_up_from_nothing_and_falls_to_a_thousandth() -> None:
    halfway = (1 + WARM_UP) / 2
    ends = [learning_rate(progress, 0.5) for progress in (0, WARM_UP / 2, WARM_UP, halfway, 1)]
    assert ends == pytest.approx([0, 0.25, 0.5, 0.5 * 0.5005, 0.0005])
    assert learning_rate(WARM_UP - 1e-9, 0.5) == pytest.approx(0.5)
    falling = [learning_rate(WARM_UP + (1 - WARM_UP) * step / 100, 0.5) for step in range(101)]
    assert all(later < earlier for earlier, later in pairwise(falling))


def test_decay_groups_hold_each_parameter_once_and_decay_matrices_alone(small_models: None) -> None:
    student = Student(teacher_width=24)
    name_of = {id(parameter): name for name, parameter in student.named_parameters()}
    groups: list[dict[str, Any]] = decay_groups(student)
    decayed, spared = ([name_of[id(parameter)] for parameter in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert sorted(decayed + spared) == sorted(name_of.values())
    of_matrices = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight", "projector.weight")
    assert set(decayed) == {name for name in name_of.values() if name.endswith(of_matrices)}
    assert {"model.cls_token", "model.pos_embed", "model.norm.weight", "projector.bias"} <= set(spared)


@pytest.mark.parametrize("r", [0, 9])
def test_a_backward_pass_leaves_the_gradient_of_this_batch_alone(small_models: None, r: int) -> None:
    student = Student(teacher_width=24).train()
    flat = flat_gradients(student.parameters())
    backward = backward_of(student, flat, torch.device("cpu"))
    images, taught = torch.rand(2, 3, 64, 64), Answer(torch.randn(2, 200), torch.randn(2, 24))
    backward(r, torch.rand(2, 3, 64, 64), *taught)  # an earlier batch
    loss = backward(r, images, *taught)

    tokens = tome_core.wrap(student.model).forward_tokens(images, r).x[:, 0]
    head = cast(nn.Linear, student.model.head)
    expected = distance(Answer(F.linear(tokens, head.weight, head.bias), student.projector(tokens)), taught)
    torch.testing.assert_close(loss, expected.detach())
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(flat, torch.cat([gradient.flatten() for gradient in wanted]), atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())


def test_the_flat_gradient_is_every_parameters_gradient() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, 3))
    flat = flat_gradients(module.parameters())
    flat.copy_(torch.arange(len(flat)))
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(
        gradient is not None and gradient.shape == p.shape
        for gradient, p in zip(gradients, module.parameters(), strict=True)
    )
    assert torch.equal(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]), flat)


def test_clipping_shortens_long_gradients_and_leaves_short_ones() -> None:
    long, short = torch.tensor([30.0, -40.0]), torch.tensor([0.3, -0.4])
    clip_(long)
    clip_(short)
    torch.testing.assert_close(long, torch.tensor([0.6, -0.8]))
    assert torch.equal(short, torch.tensor([0.3, -0.4]))


def test_the_average_starts_as_the_first_weights_and_forgets_slowly() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = Average(module)
    (averaged,) = average.model.parameters()

    def take(value: float, step: int) -> float:
        nn.init.constant_(module.weight, value)
        average.update(module, step)
        return averaged.item()

    assert take(4.0, step=0) == 4
    assert take(8.0, step=10) == pytest.approx(6)
    assert take(6.0 + 2000, step=10**6) == pytest.approx(7)
    assert not averaged.requires_grad
