"""A Ray cluster of several nodes on this machine, in a process of its own: whatever Ray warns of stays there.

It reads one command a line and writes one answer, both JSON: `[name, argument]`. It ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

STORE_BYTES = 80 << 20  # the least that Ray takes


class Machines:
    """A head that computes nothing, and nodes with a CPU each. Methods are the commands."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"metrics_report_interval_ms": 1000}}
        self._cluster = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": STORE_BYTES})
        self._nodes: dict[str, Any] = {}
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="warning")

    def add_node(self, _: None) -> str:
        node = self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def kill_node(self, node_id: str) -> None:
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)

    def deploy(self, config: dict[str, Any]) -> None:
        """What `serve deploy` does, which needs Ray's dashboard to do it through."""
        options = config.pop("http_options")
        serve.start(http_options={**options, "location": config.pop("proxy_location")})
        _get_global_client()._controller.apply_config.remote(ServeDeploySchema.model_validate(config))

    def replicas(self, _: None) -> list[dict[str, Any]]:
        """Each replica with its state, node and process."""
        details = ray.get(_get_global_client()._controller.get_serve_instance_details.remote())
        keys = ("replica_id", "state", "node_id", "pid")
        return [
            {key: replica.get(key) for key in keys}
            for application in details["applications"].values()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        ]

    def status(self, _: None) -> dict[str, str]:
        """The state of each application, by name."""
        return {name: application.status for name, application in serve.status().applications.items()}

    def metrics_ports(self, _: None) -> list[int]:
        """Where each node exports Ray's metrics."""
        return [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]

    def close(self) -> None:
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # Ray prints
    machines = Machines()
    try:
        for line in sys.stdin:
            name, argument = json.loads(line)
            print(json.dumps(getattr(machines, name)(argument)), file=out, flush=True)
    finally:
        machines.close()


if __name__ == "__main__":
    main()
