"""The compose project, on free ports of this machine."""

from __future__ import annotations

from tests.docker.cli import ROOT, command, docker

FILES = (ROOT / "docker/compose.yaml", ROOT / "tests/docker/compose.test.yaml")


class Stack:
    """docker/compose.yaml as a project of its own."""

    def __init__(self, project: str, image: str) -> None:
        self.environment = {
            "COMPOSE_FILE": ":".join(map(str, FILES)),
            "COMPOSE_PROJECT_NAME": project,
            "TOME_IMAGE": image,
            "TOME_BACKEND": "torch",
            "TOME_THREADS": "1",
            "PORT": "0",
            "PROMETHEUS_PORT": "0",
        }
        self._volumes: set[str] = set()

    def compose(self, *arguments: str) -> str:
        return docker("compose", *arguments, environment=self.environment)

    def scale(self, servers: int) -> None:
        """So many servers, all of them healthy."""
        self.compose("up", "--detach", "--no-build", "--no-recreate", "--wait", "--scale", f"server={servers}")
        self._note_volumes()

    def servers(self) -> list[str]:
        """The ids of the running servers."""
        return self.compose("ps", "--quiet", "server").split()

    def url(self, service: str = "haproxy", port: int = 8000) -> str:
        return f"http://127.0.0.1:{self.compose('port', service, str(port)).rpartition(':')[2]}"

    def roll(self, image: str) -> None:
        """docker/rolling-update.sh to another image."""
        self.environment["TOME_IMAGE"] = image
        command("docker/rolling-update.sh", environment=self.environment)
        self._note_volumes()

    def down(self) -> None:
        """Removes it all, and the volumes of replicas that went before."""
        self.compose("down", "--volumes", "--timeout", "20")
        if self._volumes:
            docker("volume", "rm", "--force", *self._volumes)

    def _note_volumes(self) -> None:
        mounts = '{{range .Mounts}}{{if eq .Destination "/var/lib/tome-server"}}{{.Name}}{{end}}{{end}}'
        self._volumes |= {docker("inspect", "--format", mounts, server) for server in self.servers()}
