"""The same matching in two models: the merges of one are recorded, and repeated in the other.

A model that rounds chooses other pairs if similarities nearly tie; answers then differ by more than rounding. Under the
same matching two models differ only by their arithmetic. Either may run fused or plain, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from tome_core import fused as fused_loop
from tome_core import vit as plain_loop
from tome_core.kernels import attend
from tome_core.kernels.groups import Groups, groups_of, plan_of
from tome_core.matching import MergePlan


@contextmanager
def recorded() -> Iterator[list[MergePlan]]:
    """Records merges, in the order of the blocks that merge.

    Yields:
        The plans, on the CPU: a list that grows with every block that merges.
    """
    plans: list[MergePlan] = []
    match_fused, match_plain = vars(fused_loop)["attend_match"], vars(plain_loop)["match"]

    def fused(*args: Any) -> tuple[Tensor, Groups]:
        y, groups = match_fused(*args)
        plans.append(_on(plan_of(groups), "cpu"))
        return y, groups

    def plain(*args: Any) -> MergePlan:
        plan: MergePlan = match_plain(*args)
        plans.append(_on(plan, "cpu"))
        return plan

    with _matching(fused, plain):
        yield plans


@contextmanager
def replayed(plans: list[MergePlan]) -> Iterator[None]:
    """Repeats recorded merges, once, instead of a model's own choice.

    Raises:
        ValueError: The model merges in more or fewer blocks than recorded, or other numbers of tokens.
    """
    left = list(plans)

    def plain(metric: Tensor, r: int, num_prefix_tokens: int) -> MergePlan:
        if not left:
            raise ValueError(f"one more block merges than the {len(plans)} that were recorded")
        plan, wanted = left.pop(0), (*metric.shape[:2], r)
        noted = (len(plan.src), plan.keep.shape[1] + plan.src.shape[1], plan.src.shape[1])
        if noted != wanted:
            raise ValueError(f"images, tokens and r are {wanted}; the recorded ones are {noted}")
        return _on(plan, metric.device)

    def fused(q: Tensor, *others: Any) -> tuple[Tensor, Groups]:
        k, v, log_size, bias, _, num_heads, r, num_prefix_tokens = others
        groups = groups_of(plain(q, r, num_prefix_tokens))
        return attend(q, k, v, log_size, bias, num_heads), groups

    with _matching(fused, plain):
        yield
    if left:
        raise ValueError(f"{len(left)} of {len(plans)} recorded blocks did not merge")


@contextmanager
def _matching(fused: Callable[..., tuple[Tensor, Groups]], plain: Callable[..., MergePlan]) -> Iterator[None]:
    """Replaces the matching of both loops by these functions."""
    with mock.patch.object(fused_loop, "attend_match", fused), mock.patch.object(plain_loop, "match", plain):
        yield


def _on(plan: MergePlan, device: Any) -> MergePlan:
    return MergePlan(*(t.to(device) for t in plan))
