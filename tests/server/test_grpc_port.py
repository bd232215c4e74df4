"""The port of gRPC: kept for all HTTP processes, and a sentence where it cannot be had."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import socket
from collections.abc import Callable

import pytest

from server.errors import SettingsError
from server.listening import address_of, reserve
from server.settings import Settings
from server.supervisor import _with_grpc_port

ASKED = Settings.model_validate({"grpc_port": 0})


def listen_shared(port: int) -> socket.socket:
    """Listens as each HTTP process does."""
    sharing = socket.socket()
    sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sharing.bind(("127.0.0.1", port))
    sharing.listen()
    return sharing


def test_processes_share_a_reserved_port_and_nobody_else_gets_it() -> None:
    with reserve("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with listen_shared(port), listen_shared(port):
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
            with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1 port {port}: "):
                reserve("127.0.0.1", port)
    with reserve("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize("other", [reserve, lambda host, port: listen_shared(port)], ids=["reserved", "listening"])
def test_a_port_that_another_server_has_is_refused_though_it_shares_it(
    other: Callable[[str, int], socket.socket],
) -> None:
    with other("127.0.0.1", 0) as theirs:
        port = theirs.getsockname()[1]
        with pytest.raises(SettingsError, match="Address already in use"):
            reserve("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1:1"), ("::1", "[::1]:1"), ("[::]", "[::]:1"), ("name", "name:1")]
)
def test_an_address_of_ipv6_has_brackets(host: str, address: str) -> None:
    assert address_of(host, 1) == address


def test_the_port_that_was_taken_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with contextlib.ExitStack() as stack:
        port = _with_grpc_port(ASKED, stack).grpc_port
        assert port and f"on 127.0.0.1:{port}" in caplog.text
    assert _with_grpc_port(Settings.model_validate({}), stack).grpc_port is None


@pytest.mark.parametrize("missing", ["grpc", "google.protobuf"])
def test_without_its_packages_the_start_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with contextlib.ExitStack() as stack, pytest.raises(SettingsError, match=r"tome-server\[grpc\]"):
        _with_grpc_port(ASKED, stack)


def test_without_any_package_of_google_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'google'")

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with contextlib.ExitStack() as stack, pytest.raises(SettingsError, match=r"tome-server\[grpc\]"):
        _with_grpc_port(ASKED, stack)
