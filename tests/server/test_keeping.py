"""The folders of the state folder in which a command keeps what it makes of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.keeping import state_folder


def test_each_kind_has_a_folder_where_anything_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert state_folder(Path("/state"), "curves") == Path("/state/curves")
    assert state_folder(Path("~/state"), "tuned") == Path("/home/of/mine/state/tuned")
    assert state_folder(None, "tuned") is None


def test_a_user_without_a_home_keeps_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict[int, object]().__getitem__)
    assert state_folder(Path("~/state"), "tuned") is None
    assert state_folder(Path("/state"), "tuned") == Path("/state/tuned")
