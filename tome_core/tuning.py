"""Tuning without labels: norms and biases learn to give at an `r` the model's answers at r=0.

The teacher is the model itself at r=0. The student is the same model at an `r` that is drawn for every batch. The
matrices do not change, so a step costs two forward passes and half a backward pass. docs/accuracy.md says what each
choice gains, and what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tome_core.tuned import tunable
from tome_core.vit import MergedViT


@dataclass(frozen=True)
class Recipe:
    """The settings of the training.

    Attributes:
        steps: Number of batches.
        batch_size: Views in a batch.
        learning_rate: The peak, for AdamW without decay; it falls to 0 by a cosine.
        warm_up: Share of the steps in which it rises.
        largest_gradient: The gradient of a step is clipped to this norm.
        temperature: Divides the logits of both; above 1, unlikely classes count for more.
    """

    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 1e-3
    warm_up: float = 0.05
    largest_gradient: float = 1.0
    temperature: float = 2.0


class Tuner:
    """Tunes the numbers of a model, step by step. The model itself does not change.

    Args:
        merged: The merging model, in eval mode and float32, on the device that computes.
        recipe: The settings of the training.
        autocast: The dtype of products during training; None keeps float32.
        names: The parameters to tune, by names in the timm model; None takes all of `tome_core.tuned.tunable`.

    Attributes:
        recipe: As given.
    """

    def __init__(
        self,
        merged: MergedViT,
        recipe: Recipe | None = None,
        autocast: torch.dtype | None = None,
        names: Iterable[str] | None = None,
    ) -> None:
        self.recipe, self._autocast = recipe or Recipe(), autocast
        self._teacher = merged.plain().take_tuned(None)
        still = {name: parameter.detach() for name, parameter in self._teacher.model.named_parameters()}
        learning = tunable(self._teacher.model, merged.family) if names is None else names
        self._numbers = {name: nn.Parameter(still[name].clone()) for name in learning}
        # # The other parameters are detached, so that no gradient is computed for them.
        self._student = self._teacher.with_tensors(still | self._numbers)
        self._optimizer = torch.optim.AdamW(self._numbers.values(), lr=self.recipe.learning_rate, weight_decay=0.0)
        self._device = next(iter(still.values())).device
        self._part = self.recipe.batch_size

    def numbers(self) -> dict[str, Tensor]:
        """The current numbers, in float32 on the CPU."""
        return {name: number.detach().cpu().float().clone() for name, number in self._numbers.items()}

    @torch.no_grad()
    def take(self, numbers: Mapping[str, Tensor]) -> None:
        """Replaces the numbers by others of `numbers`."""
        for name, number in self._numbers.items():
            number.copy_(numbers[name])

    def step(self, images: Tensor, r: int, progress: float) -> Tensor:
        """Learns from a batch at one `r`. A batch that exceeds a GPU's memory is split.

        Args:
            images: (B, 3, H, W), normalised.
            r: Tokens merged in each block; draw it again for every step.
            progress: Finished share of the training, from 0 to 1.

        Returns:
            The loss, a number on the device: mean divergence of the student's answers from the teacher's, in nats,
            times the square of the temperature.
        """
        while True:
            try:
                loss = self._gradient(images, r)
                break
            except torch.OutOfMemoryError:
                if self._part == 1:
                    raise
            # # After the except clause, because the error keeps the tensors of the failed step alive.
            self._part = -(-self._part // 2)
            torch.cuda.empty_cache()
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * pace(progress, self.recipe.warm_up)
        nn.utils.clip_grad_norm_(self._numbers.values(), self.recipe.largest_gradient)
        self._optimizer.step()
        return loss

    @torch.inference_mode()
    def answers(self, images: Tensor, r: int, tuned: bool = True) -> Tensor:
        """Logits (B, K) in float32 at an `r`, with the current numbers or with the model's own."""
        with self._rounded():
            logits: Tensor = (self._student if tuned else self._teacher)(images, r)
        return logits.float()

    def state(self) -> dict[str, Tensor]:
        """The state for `resume`, after a step: the numbers and the optimizer's state, on the CPU."""
        state: dict[str, Tensor] = {}
        for name, number in self._numbers.items():
            known = {"number": number.detach(), **self._optimizer.state[number]}
            state |= {f"{kind} {name}": tensor.cpu().clone() for kind, tensor in known.items()}
        return state

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state`."""
        self.take({name: state[f"number {name}"] for name in self._numbers})
        for name, number in self._numbers.items():
            known = {"step": state[f"step {name}"].clone()}  # # AdamW counts steps on the CPU
            known |= {kind: state[f"{kind} {name}"].to(number, copy=True) for kind in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[number] = known

    def _gradient(self, images: Tensor, r: int) -> Tensor:
        """Sets the gradients of a batch; returns its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        total, T = torch.zeros((), device=self._device), self.recipe.temperature
        for part in images.split(self._part):
            with self._rounded():
                with torch.no_grad():
                    wanted = self._teacher(part, 0)
                logits = self._student(part, r)
            loss = divergence(logits / T, wanted / T) * (T * T * len(part) / len(images))
            loss.backward()
            total += loss.detach()
        return total

    def _rounded(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, self._autocast) if self._autocast else nullcontext()


def pace(progress: float, warm_up: float) -> float:
    """The learning rate at a share of the training, relative to its peak: a linear rise, then half a cosine down to
    0.
    """
    if progress < warm_up:
        return max(progress, 1e-3) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min((progress - warm_up) / (1 - warm_up), 1.0)))


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of answers (B, K) from the wanted ones, in nats."""
    logits, wanted = logits.float().log_softmax(dim=1), wanted.float().log_softmax(dim=1)
    return F.kl_div(logits, wanted, log_target=True, reduction="batchmean")
