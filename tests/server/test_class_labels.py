"""Words for each class: every way to write them that is clear, and a sentence for every other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.device.class_labels import class_labels
from server.errors import SettingsError

CLEAR: dict[str, tuple[Any, Any]] = {
    "a list": (["cat", "dog", "emu"], None),
    "by class number": ({"0": "cat", "1": "dog", "2": "emu"}, None),
    "by class number, in any order": ({"2": "emu", "0": "cat", "1": "dog"}, None),
    "to class numbers": ({"emu": 2, "cat": 0, "dog": 1}, None),
    "described by name": (["n1", "n2", "n3"], {"n3": "emu", "n1": "cat", "n2": "dog"}),
    "described where the name says nothing": (["cat", "dog", "n3"], {"n3": "emu", "n4": "gnu"}),
    "described in a list": (["n1", "n2", "n3"], ["cat", "dog", "emu"]),
}

UNCLEAR: dict[str, tuple[Any, Any, str]] = {
    "too few": (["cat", "dog"], None, "lists 2 classes; the model has 3"),
    "too many": (["cat", "dog", "emu", "gnu"], None, "lists 4 classes"),
    "a hole": ({"0": "cat", "2": "emu", "3": "gnu"}, None, "has no class 1"),
    "one class too many": ({"0": "a", "1": "b", "2": "c", "3": "d"}, None, "lists 4 classes"),
    "numbers": ([7, 8, 9], None, "has 7 for class 0"),
    "null": (["cat", None, "emu"], None, "has None for class 1"),
    "nested": (["cat", ["dog"], "emu"], None, r"has \['dog'\] for class 1"),
    "empty text": (["cat", "", "emu"], None, "has '' for class 1"),
    "half a character": (["cat", "\ud800", "emu"], None, "for class 1"),
    "text of a megabyte": (["cat", "x" * 1_000_000, "emu"], None, "1 to 1000 characters"),
    "text": ("abc", None, "label_names is 'abc'"),
    "a number": (3, None, "label_names is 3"),
    "one class twice": ({"cat": 0, "dog": 0, "emu": 1}, None, "two names the same class"),
    "keys that are no classes": ({"cat": "Cat", "dog": "Dog", "emu": "Emu"}, None, "has the key 'cat'"),
    "a number written in two ways": ({"0": "a", "00": "b", "1": "c"}, None, "has the key '00'"),
    "numbers to numbers": ({"0": 1, "1": 0, "2": 2}, None, "has 1 for class 0"),
    "nested descriptions": (["n1", "n2", "n3"], {"n1": {"detail": "cat"}}, "label_descriptions has"),
    "too few descriptions": (["n1", "n2", "n3"], ["cat"], "label_descriptions lists 1"),
}


@pytest.mark.parametrize("case", CLEAR)
def test_labels_that_are_clear_come_in_class_order(case: str) -> None:
    assert class_labels(*CLEAR[case], num_classes=3) == ("cat", "dog", "emu")


@pytest.mark.parametrize("case", UNCLEAR)
def test_labels_that_are_not_clear_stop_the_start(case: str) -> None:
    names, descriptions, reason = UNCLEAR[case]
    with pytest.raises(SettingsError, match=reason) as refusal:
        class_labels(names, descriptions, 3)
    assert len(str(refusal.value)) < 300 and "\n" not in str(refusal.value)


@given(st.permutations(range(20)))
def test_a_mapping_by_class_is_the_list_whatever_the_order_of_its_keys(order: list[int]) -> None:
    assert class_labels({str(index): f"name {index}" for index in order}, None, 20) == tuple(
        f"name {index}" for index in range(20)
    )
