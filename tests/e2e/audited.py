"""Notes what a Python process and its children send and write: `audited` gives the environment that makes them do so.

As `sitecustomize` it is the first thing that every process imports, and its hook stays over a fork.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NOT_OF_USERS = (
    *("TOME_", "XDG_", "HF_", "ORT_", "TORCH", "TRITON_", "CUDA_CACHE_PATH", "MPL"),  # torch sets some where it runs
    *("CI", "TF_BUILD", "JENKINS_URL"),  # which keep packages from reporting
)
"""Beginnings of variables that this process may have, and that say where packages write or whether they report."""
_FILE = os.environ.get("AUDIT_FILE")


def audited(folder: Path) -> dict[str, str]:
    """An environment as users have it, with an empty home, whose processes note what they do in `folder`."""
    for name in ("home", "site", "tmp"):
        (folder / name).mkdir()
    (folder / "site/sitecustomize.py").write_bytes(Path(__file__).read_bytes())
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OF_USERS)}
    root = Path(__file__).resolve().parents[2]
    ours = {"HOME": "home", "TMPDIR": "tmp", "TOME_STATE_DIR": "state", "AUDIT_FILE": "noted"}
    paths = {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{root}", "PYTHONDONTWRITEBYTECODE": "1"}
    return theirs | {name: str(folder / place) for name, place in ours.items()} | paths


def noted(folder: Path) -> tuple[list[str], list[str]]:
    """The hosts that were looked up or connected to, and the files and folders that were written."""
    lines = [line.split("\t", 1) for line in (folder / "noted").read_text().splitlines()]
    hosts, files = ([place for kind, place in lines if kind == wanted] for wanted in ("host", "file"))
    return hosts, files


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | bytes) and isinstance(args[2], int) and args[2] & _WRITES:
        _note("file", args[0])
    elif event in ("os.mkdir", "os.rename", "os.symlink", "os.link"):
        _note("file", args[1] if event != "os.mkdir" else args[0])
    elif event == "socket.getaddrinfo":
        _note("host", args[0])
        if args[0] not in ("127.0.0.1", "localhost"):
            raise OSError("no test looks others up")
    elif event == "socket.connect" and isinstance(args[1], tuple):  # a string is a Unix socket
        _note("host", args[1][0])


def _note(kind: str, place: Any) -> None:
    if os.fspath(place) == _FILE:
        return
    assert _FILE is not None
    place = os.path.abspath(os.fsdecode(place)) if kind == "file" else place
    written = os.open(_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(written, f"{kind}\t{place}\n".encode())
    os.close(written)


if __name__ == "sitecustomize" and _FILE:
    sys.addaudithook(_hook)
