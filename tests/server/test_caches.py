"""Where Triton, CUDA and matplotlib are told to keep their files."""

from __future__ import annotations

import atexit
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from server.caches import keep_caches_in
from server.cli import main


def forget_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this user one of whom the system knows no home folder."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)


def test_they_lie_in_the_state_folder_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TRITON_CACHE_DIR": "/mine"}
    monkeypatch.setattr(os, "environ", environment)
    keep_caches_in(Path("/state"))
    assert environment == {
        "TRITON_CACHE_DIR": "/mine",
        "CUDA_CACHE_PATH": "/state/cuda",
        "MPLCONFIGDIR": "/state/matplotlib",
    }


def test_without_a_state_folder_they_last_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}
    at_exit: list[tuple[object, ...]] = []
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(atexit, "register", lambda *args, **kwargs: at_exit.append(args))
    keep_caches_in(None)
    (folder,) = tmp_path.iterdir()
    assert {Path(each).parent for each in environment.values()} == {folder}
    assert len(at_exit) == 1 and at_exit[0][1] == folder
    keep_caches_in(None)  # a child process has it from its parent
    assert list(tmp_path.iterdir()) == [folder]


def test_where_no_folder_can_be_had_the_packages_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    keep_caches_in(None)
    assert environment == {}
    forget_home(monkeypatch)
    keep_caches_in(Path("~/state"))
    assert environment == {}


def test_a_user_without_a_home_folder_reads_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_home(monkeypatch)
    assert main(["serve", "--port", "0"]) == 2
    assert "has no home folder; name another, or none" in capsys.readouterr().err
