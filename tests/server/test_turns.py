"""Turns by memory: first come, first served; never more than there is; who leaves gives back what was theirs."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from server.images.turns import Turns
from tests.server.conftest import until

MEMORY = 10


@given(
    sizes=st.lists(st.integers(0, MEMORY), min_size=1, max_size=12),
    places=st.integers(1, 4),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=30),
)
def test_whatever_ends_or_leaves_all_others_get_their_turn_in_order(
    sizes: list[int], places: int, steps: list[tuple[bool, int]]
) -> None:
    async def scenario() -> None:
        turns, started = Turns(MEMORY, places), []
        held = dict.fromkeys(range(len(sizes)), 0)
        ends = [asyncio.Event() for _ in sizes]

        async def take(index: int) -> None:
            async with turns.turn(sizes[index]):
                started.append(index)
                held[index] = 1
                try:
                    assert sum(held.values()) <= places
                    assert sum(size * held[index] for index, size in enumerate(sizes)) <= MEMORY
                    await ends[index].wait()
                finally:
                    held[index] = 0

        tasks = [asyncio.create_task(take(index)) for index in range(len(sizes))]
        for leaves, which in steps:
            if which < len(sizes):
                tasks[which].cancel() if leaves else ends[which].set()
            await asyncio.sleep(0)
        for end in ends:
            end.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert started == sorted(started)
        assert all(task.cancelled() or index in started for index, task in enumerate(tasks))
        async with turns.turn(MEMORY):  # all of it is there again
            pass

    asyncio.run(scenario())


async def test_a_large_one_is_not_passed_by_small_ones_and_they_go_on_when_it_leaves() -> None:
    turns, done, go_on = Turns(MEMORY, 3), [], asyncio.Event()

    async def take(name: str, size: int) -> None:
        async with turns.turn(size):
            done.append(name)
            await go_on.wait()

    first = asyncio.create_task(take("first", 4))
    large = asyncio.create_task(take("large", MEMORY))
    small = asyncio.create_task(take("small", 1))
    await until(lambda: done == ["first"])
    for _ in range(10):
        await asyncio.sleep(0)
    assert done == ["first"]
    large.cancel()
    await until(lambda: done == ["first", "small"])
    go_on.set()
    await asyncio.gather(first, small)
