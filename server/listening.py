"""The socket that the service listens on, and the address under which a user finds it."""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address

from server.errors import SettingsError

_BACKLOG = 2048
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: An address, of IPv6 with brackets or without, or a name. `::` takes clients of IPv4 too, where the system
            can do that. A name that has addresses of both kinds stands for its IPv4 one.
        port: 0 takes a free one.

    Raises:
        SettingsError: The address cannot be listened on.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare:
        raise SettingsError("host is empty; 0.0.0.0 stands for every interface")
    try:
        found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except (OSError, ValueError) as error:  # ValueError: a text that can be no name
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"cannot listen on {host} port {port}: {reason}") from None


def reserve(host: str, port: int) -> socket.socket:
    """A socket that keeps a port for processes which each listen on it with SO_REUSEPORT, and gets no clients itself.

    Args:
        host: As of `listen`.
        port: 0 takes a free one.

    Raises:
        SettingsError: The address cannot be listened on, or somebody does.
    """
    with listen(host, port) as alone:  # without the option: with it, another server would get its share of the clients
        family, address = alone.family, alone.getsockname()
    reserved = socket.socket(family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        raise SettingsError(f"cannot listen on {host} port {address[1]}: {error.strerror}") from None
    return reserved


def address_of(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an address of IPv6."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def url_of(listener: socket.socket) -> str:
    """The address of a listening socket as a client on this machine can use it."""
    address, port = listener.getsockname()[:2]
    address = _EVERY_INTERFACE.get(address, address)
    if isinstance(ip_address(address), IPv6Address):
        address = f"[{address.replace('%', '%25')}]"
    return f"http://{address}:{port}"
