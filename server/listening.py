"""The listening socket of the service, and its URL for users."""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, ip_address

from server.errors import SettingsError

_BACKLOG = 2048
_EVERY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket.

    Args:
        host: An address (IPv6 with or without brackets) or a name. `::` also accepts IPv4 clients if the system
            supports that. A name with addresses of both kinds stands for its IPv4 address.
        port: 0 takes a free port.

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
    except (OSError, ValueError) as error:  # ValueError: not a possible name
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"cannot listen on {host} port {port}: {reason}") from None


def reserve(host: str, port: int) -> socket.socket:
    """Reserves a port for processes that each listen on it with SO_REUSEPORT. The socket itself gets no clients.

    Args:
        host: See `listen`.
        port: 0 takes a free port.

    Raises:
        SettingsError: The address cannot be listened on, or is in use.
    """
    with listen(host, port) as alone:  # without the option, because with it another server would share the clients
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
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def url_of(listener: socket.socket) -> str:
    """The URL of a listening socket for a client on this machine."""
    address, port = listener.getsockname()[:2]
    address = _EVERY_INTERFACE.get(address, address)
    if isinstance(ip_address(address), IPv6Address):
        address = f"[{address.replace('%', '%25')}]"
    return f"http://{address}:{port}"
