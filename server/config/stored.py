"""A configuration as servers store it, in JSON: read, or refused in a sentence."""

from __future__ import annotations

from typing import Any

from server.dial import setting_from_json
from server.documents import read_json
from server.errors import InvalidError, shown
from server.types import Configuration

MOST_VERSIONS = 2**53
"""The first version that is none: metrics, and others that read JSON, count in floats."""


def read_configuration(content: str | bytes) -> Configuration:
    """What `Configuration.to_json` gave, as JSON.

    Raises:
        InvalidError: It did not write this.
    """
    version, models = read_versioned(content)
    return Configuration(version, {name: setting_from_json(r) for name, r in models.items()})


def read_versioned(content: str | bytes) -> tuple[int, dict[str, Any]]:
    """The version, and what is said of each model by name, of `{"version": 3, "models": {...}}`.

    Raises:
        InvalidError: It is not that.
    """
    document = read_json(content)
    if not isinstance(document, dict):
        raise InvalidError(f"it is {shown(document)}, and no object with version and models")
    version, models = document.get("version"), document.get("models")
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version < MOST_VERSIONS:
        raise InvalidError(f"its version is {shown(version)}; it must be an integer from 0 to {MOST_VERSIONS - 1}")
    if not isinstance(models, dict):
        raise InvalidError(f"its models are {shown(models)}; they must be an object, by name")
    return version, models
