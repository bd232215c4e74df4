"""The sources of settings: flags, TOME_* variables and a YAML file. Only this file reads TOME_* variables.

A flag wins over a variable, and a variable over the file. An unknown name or a value out of range stops the start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.documents import read_yaml
from server.errors import InvalidError, SettingsError, shown
from server.keys import KEYS
from server.settings import Settings

PREFIX = "TOME_"
_OF_KUBERNETES = re.compile(
    r"^(\w+_)?service_(host|port)|^(\w+_)?port(_\d+_(tcp|udp)\w*)?=(tcp|udp)://|_(tcp|udp)_(proto|addr|port)="
)
_SECRET = {*KEYS, "shared_config"}
"""Never shown in messages: a URL of Redis may contain a password."""
_NEVER_EMPTY = {*KEYS, *(f"{key}_file" for key in KEYS)}
"""Variables that must not be empty: a missing secret would open the service silently."""


_OF_PLATFORMS = {
    "vertex": {
        "AIP_HTTP_PORT": "port",
        "AIP_PREDICT_ROUTE": "vertex_predict_route",
        "AIP_HEALTH_ROUTE": "vertex_health_route",
    },
    "sagemaker": {"SAGEMAKER_BIND_TO_PORT": "port"},
}
"""Variables by which a platform sets a setting in its containers, for each protocol. All other sources win over
them.
"""


def load_settings(flags: Mapping[str, Any], config: str | None = None) -> Settings:
    """Joins flags, `TOME_*` variables and a YAML file into one checked object.

    Args:
        flags: The flags by field name; None counts as missing.
        config: A YAML file; `TOME_CONFIG` also names one.

    Raises:
        SettingsError: Something is unknown, missing or out of range.
    """
    variables = {name[len(PREFIX) :].lower(): text for name, text in os.environ.items() if name.startswith(PREFIX)}
    # An empty variable counts as missing. Variables that Kubernetes sets for a Service named tome or tome-server are
    # skipped.
    variables = {
        name: text
        for name, text in variables.items()
        if (text or name in _NEVER_EMPTY) and not _OF_KUBERNETES.search(f"{name}={text}")
    }
    config_variable = variables.pop("config", None)
    said = {name: value for name, value in flags.items() if value is not None}
    said = {**_read_yaml(config or config_variable), **variables, **said}
    try:
        settings = Settings(**said)
        platform = _of_platforms(settings.protocol)
        return Settings(**{**platform, **said}) if platform.keys() - said.keys() else settings
    except ValidationError as error:
        raise SettingsError("\n".join(_line(problem) for problem in error.errors())) from None


def _of_platforms(protocols: Sequence[str]) -> dict[str, str]:
    """The settings from the platforms of these protocols, by field name."""
    names = [pair for protocol in protocols for pair in _OF_PLATFORMS.get(protocol, {}).items()]
    return {field: os.environ[variable] for variable, field in names if os.environ.get(variable)}


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = read_yaml(Path(os.path.expanduser(path)).read_bytes())
    except (OSError, ValueError, InvalidError) as error:  # ValueError: an invalid path
        raise SettingsError(f"config file {path}: {error}") from None
    if content is None:  # an empty file
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"config file {path}: it must hold one setting a line, like 'port: 8000'")
    return {key.replace("-", "_"): value for key, value in content.items()}


def _line(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = re.split(r"[^\w.-]", where)[0]  # the rest may be a key: YAML reads {api_key:KEY} as one name
        return f"there is no setting {name!r}; 'tome-server serve --help' lists them"
    message: str = problem["msg"].removeprefix("Value error, ")
    if not where:
        return message
    got = "" if where in _SECRET else f" (got {shown(problem['input'])})"
    return f"{where}: {message}{got}"
