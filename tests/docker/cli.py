"""The docker command, for tests: its output, its failure with what it said, and conditions to wait for."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAIT_S = 600.0


def docker(*arguments: str, environment: dict[str, str] | None = None, text: str | None = None) -> str:
    """Runs docker and gives its standard output."""
    return command("docker", *arguments, environment=environment, text=text)


def command(*words: str, environment: dict[str, str] | None = None, text: str | None = None) -> str:
    """Runs a command in the repository's root, with variables beside the present ones."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TOME_", "COMPOSE_"))}
    done = subprocess.run(
        words, cwd=ROOT, env={**variables, **(environment or {})}, input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def until(condition: Callable[[], bool], what: str) -> None:
    """Polls a condition."""
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.2)


def need_docker() -> None:
    """Skips the test where no engine answers."""
    if shutil.which("docker") is None:
        pytest.skip("the docker command is not installed")
    answer = subprocess.run(["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True)
    if answer.returncode != 0 or not answer.stdout.strip():
        pytest.skip(f"docker info: {answer.stderr.strip() or 'no server'}")
