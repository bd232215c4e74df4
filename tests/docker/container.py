"""One container of the image, on a free port of this machine."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import httpx

from tests.docker.cli import docker, until

Run = Callable[..., "Container"]


class Container:
    """A running `docker run IMAGE`; flags are those of `docker run`."""

    def __init__(self, image: str, *flags: str) -> None:
        # By torch on one thread, so that it starts soon on a small machine.
        variables = ("--env", "TOME_BACKEND=torch", "--env", "TOME_THREADS=1")
        self.id = docker("run", "--detach", "--publish", "127.0.0.1::8000", *variables, *flags, image)

    @property
    def url(self) -> str:
        return "http://" + docker("port", self.id, "8000/tcp").splitlines()[0]

    @property
    def state(self) -> dict[str, Any]:
        """What `docker inspect` says of it: Status, ExitCode, OOMKilled, Health."""
        state: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .State}}", self.id))
        return state

    def wait_until_healthy(self) -> None:
        """Returns once its HEALTHCHECK says so."""
        until(lambda: self.state["Health"]["Status"] == "healthy" or not self.state["Running"], "a healthy container")
        assert self.state["Running"], log(self.id)

    def python(self, code: str) -> str:
        """Runs Python inside."""
        return docker("exec", self.id, "python", "-c", code)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        return float(re.findall(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)[0])

    def stop(self) -> None:
        """SIGTERM, and all the time that the service may take."""
        docker("stop", "--time", "75", self.id)

    def remove(self) -> None:
        docker("rm", "--force", "--volumes", self.id)


def log(container: str) -> str:
    """What a container has written."""
    done = subprocess.run(["docker", "logs", container], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def kill_engine(container: str) -> int:
    """Ends a server's engine process by SIGKILL and gives its number; the server's log says which it is."""
    pid = int(re.findall(r"engine is process (\d+)", log(container))[-1])
    docker("exec", container, "python", "-c", f"import os; os.kill({pid}, 9)")
    return pid
