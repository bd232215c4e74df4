"""Reads stored configurations (JSON); a wrong one is an InvalidError of one sentence."""

from __future__ import annotations

from typing import Any

from server.dial import setting_from_json
from server.documents import read_json
from server.errors import InvalidError, shown
from server.types import Configuration

MOST_VERSIONS = 2**53
"""The first number that is no version: metrics and JSON readers count in floats."""


def read_configuration(content: str | bytes) -> Configuration:
    """Parses the JSON of `Configuration.to_json`.

    Raises:
        InvalidError: The content is something else.
    """
    version, models = read_versioned(content)
    return Configuration(version, {name: setting_from_json(r) for name, r in models.items()})


def read_versioned(content: str | bytes) -> tuple[int, dict[str, Any]]:
    """The version and the models of `{"version": 3, "models": {...}}`.

    Raises:
        InvalidError: The content is something else.
    """
    document = read_json(content)
    if not isinstance(document, dict):
        raise InvalidError(f"it is {shown(document)}; it must be an object with version and models")
    version, models = document.get("version"), document.get("models")
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version < MOST_VERSIONS:
        raise InvalidError(f"its version is {shown(version)}; it must be an integer from 0 to {MOST_VERSIONS - 1}")
    if not isinstance(models, dict):
        raise InvalidError(f"its models are {shown(models)}; they must be an object, by name")
    return version, models
