"""Splits a batch that fails until the culprit is alone, so that the other images are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from server.errors import EngineError, ServerError, UnavailableError

P = TypeVar("P")
A = TypeVar("A")

HOPELESS = 3
"""So many payloads that fail alone, with no answer in the batch, mean that the error is not a payload's."""


async def run_split(
    run: Callable[[Sequence[P]], Awaitable[Sequence[A | ServerError]]], payloads: Sequence[P]
) -> list[A | ServerError]:
    """Runs a batch; a part that fails runs again in two halves, depth first.

    One culprit among n costs 2 log2(n) more runs, of about 2 n payloads together. An error of the whole batch costs
    about n payloads more; the rest is not tried. The halves take alternate payloads, so that neighbours of one request
    are separated and do not look like an error of the whole batch.

    Args:
        run: Gives one answer for each payload, in order, or raises. An answer may be the error of that payload alone.
            UnavailableError ends the whole batch.
        payloads: The batch.

    Returns:
        For each payload its answer or its error.
    """
    outcomes: dict[int, A | ServerError] = {}
    parts = [list(range(len(payloads)))]
    num_failed_alone, is_any_answered = 0, False
    final: ServerError | None = None
    while parts:
        part = parts.pop()
        error = final
        if error is None:
            try:
                answers = await run([payloads[index] for index in part])
                if len(answers) != len(part):
                    raise EngineError(f"the engine gave {len(answers)} answers to {len(part)} images")
                outcomes.update(zip(part, answers, strict=True))
                is_any_answered = True
                continue
            except Exception as raised:  # any error is the answer of that part
                error = raised if isinstance(raised, ServerError) else EngineError(f"the model failed: {raised!r}")
            num_failed_alone += len(part) == 1
            if isinstance(error, UnavailableError) or (num_failed_alone >= HOPELESS and not is_any_answered):
                final = error
        if len(part) > 1 and final is None:
            parts += [part[1::2], part[::2]]
        else:
            outcomes.update(dict.fromkeys(part, error))
    return [outcomes[index] for index in range(len(payloads))]
