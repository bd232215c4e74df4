"""A dict of bounded size against a list that does the same slowly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.recent import Recent


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from(["set", "get", "pop"]), st.integers(0, 8))))
def test_it_holds_what_was_set_last(most: int, steps: list[tuple[str, int]]) -> None:
    recent, wanted = Recent[int, int](most), list[int]()
    for what, key in steps:
        if what == "get":
            assert recent.get(key) == (-key if key in wanted else None)
            continue
        wanted = [each for each in wanted if each != key]
        if what == "set":
            recent[key] = -key
            wanted = [*wanted, key][-most:]
        else:
            recent.pop(key, None)
        assert list(recent.items()) == [(each, -each) for each in wanted]
