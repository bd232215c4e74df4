"""Where Triton, CUDA and matplotlib are told to keep their files."""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path

import pytest

from server.caches import keep_caches_in


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
