"""Documents that people and other programs write, in YAML or JSON: read, or refused in a sentence."""

from __future__ import annotations

import json
import re

import yaml

from server.errors import InvalidError

MOST_MERGED = 10_000
"""Entries of a mapping that `<<` joins. A few lines would otherwise fill any memory: each may take the last twice."""

_LONGEST = 300
_QUOTED = re.compile(r"""(['"])(?!(utf-\d+|<[a-z ]+>|\\?.)\1).*\1""")
"""What a parser quotes of a document, which may be a key; but for single characters, and its own names of things."""


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.YAMLError(f"a mapping has more than {MOST_MERGED} entries")


def read_yaml(content: str | bytes) -> object:
    """What a YAML document holds.

    Raises:
        InvalidError: It is none.
    """
    try:
        return yaml.load(content, _Loader)
    except Exception as error:  # besides its own errors PyYAML lets out what int(), date() and the like say of a value
        raise InvalidError(f"it is no YAML: {_without_quotes(error)}") from error


def read_json(content: str | bytes) -> object:
    """What a JSON document holds.

    Raises:
        InvalidError: It is none.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"it is no JSON: {_without_quotes(error)}") from error


def sentence(error: Exception) -> str:
    """What an error of somebody else's says, in a line that is not long."""
    return " ".join((str(error) or type(error).__name__).split())[:_LONGEST]


def _without_quotes(error: Exception) -> str:
    text = sentence(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:  # whose text quotes the line
        text = f"{error.problem}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return _QUOTED.sub("...", text)
