"""The service of docker/ray/serve.yaml on a real cluster: a head, and two nodes that hold a replica each."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import photo

__all__ = ["photo"]

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docker" / "ray" / "serve.yaml"
LIMIT_S = 600.0

PATIENT = {f"RAY_SERVE_PROXY_{check}_TIMEOUT_S": "120" for check in ("READY_CHECK", "HEALTH_CHECK")}
"""Ray kills a proxy that does not answer within 5 s, which a busy machine can take."""


class RayService:
    """The service on a cluster, and what a test wants to know of it. Answers come from Ray's proxy on the head."""

    def __init__(self, log: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TOME_")}
        environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | PATIENT
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.ray.cluster"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
        self.config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": free_port()}}
        application = self.config["applications"][0]
        application["args"] |= {"backend": "torch"}
        self.deployment: dict[str, Any] = application["deployments"][0]
        del self.deployment["autoscaling_config"]
        self.deployment |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}}
        self.url = f"http://127.0.0.1:{self.config['http_options']['port']}"

    def tell(self, command: str, argument: Any = None) -> Any:
        """Has the cluster's process do something; gives its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, argument]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text()
        return json.loads(answer)

    def deploy(self, **changes: Any) -> None:
        """Deploys the configuration with changes of the deployment; returns before they are everywhere."""
        self.deployment |= changes
        self.tell("deploy", self.config)

    def wait_until_running(self) -> None:
        """Returns once Ray says that all replicas run, and that no other is left."""

        def runs() -> bool:
            states = [replica["state"] for replica in self.tell("replicas")]
            all_there = states == ["RUNNING"] * self.deployment["num_replicas"]
            return all_there and bool(self.tell("status") == {"tome": "RUNNING"})

        until(runs, self.state)

    def state(self) -> str:
        """What Ray says of the application, for a failure's message."""
        return f"{self.tell('status')}, {self.tell('replicas')}\n{self._log.read_text()}"

    def replicas(self) -> dict[str, dict[str, Any]]:
        """The replicas that run, by id, with `node_id` and `pid`."""
        return {replica["replica_id"]: replica for replica in self.tell("replicas") if replica["state"] == "RUNNING"}

    def metrics(self, name: str) -> dict[str, float]:
        """One of our metrics, as Ray exports it: its sum in each replica that has it."""
        found: dict[str, float] = {}
        for port in self.tell("metrics_ports"):
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            for labels, value in re.findall(rf"^ray_{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
                replica = re.findall(r'replica="(?:.*#)?(\w+)"', labels)[0]
                found[replica] = found.get(replica, 0) + float(value)
        return found

    def close(self) -> None:
        """Ends the cluster."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def until(condition: Callable[[], bool], state: Callable[[], object] = str) -> None:
    """Polls a condition; a request that finds nobody counts as not yet."""
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(str(state()))


@pytest.fixture(scope="module")
def ray_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    """One cluster for all tests of a module, each of which leaves two replicas that run."""
    with closing(RayService(tmp_path_factory.mktemp("ray") / "log")) as service:
        for _ in range(2):
            service.tell("add_node")
        service.deploy()
        service.wait_until_running()
        yield service
