"""Whether OpenTelemetry's variables ask for spans. Only this module and the SDK read OTEL_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from server.errors import SettingsError, shown

if TYPE_CHECKING:
    from server.tracing.provider import Tracing

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_BASE, _TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


def traces_endpoint(variables: Mapping[str, str] = os.environ) -> str | None:
    """The URL of the collector; None if no variable asks for spans.

    Raises:
        SettingsError: A variable is wrong or asks for something unsupported, or a package is missing.
    """
    said = {name: text.strip() for name, text in variables.items() if name.startswith("OTEL_") and text.strip()}
    name = _TRACES if _TRACES in said else _BASE
    exporter = said.get("OTEL_TRACES_EXPORTER", "otlp").lower()
    if name not in said or said.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return None
    if exporter != "otlp":
        raise SettingsError(f"OTEL_TRACES_EXPORTER is {shown(exporter)}; it must be otlp or none")
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = said.get(variable, "http/protobuf")
        if protocol != "http/protobuf":
            raise SettingsError(
                f"{variable} is {shown(protocol)}; it must be http/protobuf, which collectors take on port 4318"
            )
    url = said[name]
    if not url.lower().startswith(("http://", "https://")):
        raise SettingsError(f"{name} is {shown(url)}; it must begin with http:// or https://")
    if not all(_is_installed(package) for package in _NEEDED):
        raise SettingsError(f"{name} is set, and OpenTelemetry is missing: pip install 'tome-server[otel]'")
    return url if name == _TRACES else f"{url.rstrip('/')}/v1/traces"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def start_tracing(process: str, *, follows: bool = False) -> Tracing | None:
    """Starts tracing in this process; None if no variable asks for spans.

    Args:
        process: Its name, an attribute of all its spans.
        follows: Records exactly the children of recorded requests.

    Raises:
        SettingsError: See `traces_endpoint`.
    """
    endpoint = traces_endpoint()
    if endpoint is None:
        return None
    from server.tracing.provider import Tracing, sending_to  # imports OpenTelemetry, so only when it is needed

    return Tracing(sending_to(endpoint), process, follows=follows)
