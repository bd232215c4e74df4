"""The address that is listened on: IPv4, IPv6, both or a name; how it is shown; a sentence where it cannot be had."""

from __future__ import annotations

import socket

import pytest

from server.errors import SettingsError
from server.listening import listen, url_of


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def reached_from(listener: socket.socket) -> list[str]:
    """The loopback addresses by which a client gets through."""
    reached = []
    for address in ("127.0.0.1", "::1"):
        try:
            with socket.create_connection((address, listener.getsockname()[1]), timeout=5):
                reached.append(address)
        except OSError:
            pass
    return reached


@pytest.mark.parametrize(
    ("host", "shown", "reached"),
    [
        ("127.0.0.1", "127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", "127.0.0.1", ["127.0.0.1"]),
        ("localhost", "127.0.0.1", ["127.0.0.1"]),
        pytest.param("::1", "[::1]", ["::1"], marks=needs_ipv6),
        pytest.param("[::1]", "[::1]", ["::1"], marks=needs_ipv6),
        pytest.param("::", "[::1]", ["127.0.0.1", "::1"], marks=needs_ipv6),
    ],
)
def test_it_listens_where_it_is_told_and_shows_an_address_that_can_be_used(
    host: str, shown: str, reached: list[str]
) -> None:
    with listen(host, 0) as listener:
        assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"
        assert reached_from(listener) == reached


@needs_ipv6
def test_where_a_system_keeps_ipv4_apart_the_ipv6_wildcard_still_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with listen("::", 0) as listener:
        assert reached_from(listener) == ["::1"]


def test_a_machine_without_ipv6_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(SettingsError, match="^cannot listen on ::1 port 81: Address family not supported by protocol$"):
        listen("::1", 81)


@pytest.mark.parametrize("host", ["", "[]", "256.1.1.1", "nobody.invalid", "x" * 300, "a\0b", "192.0.2.1", "1::2::3"])
def test_a_host_that_is_none_of_this_machine_is_told_in_a_sentence(host: str) -> None:
    with pytest.raises(SettingsError, match="listen|empty") as refusal:
        listen(host, 0)
    assert "\n" not in str(refusal.value)


def test_the_scope_of_an_address_is_escaped_in_its_url() -> None:
    class Listener:
        def getsockname(self) -> tuple[str, int, int, int]:
            return "fe80::1%eth0", 8000, 0, 2

    listener: socket.socket = Listener()  # type: ignore[assignment]
    assert url_of(listener) == "http://[fe80::1%25eth0]:8000"
