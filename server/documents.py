"""YAML and JSON documents that people and other programs write. An error is one sentence."""

from __future__ import annotations

import json
import re

import yaml

from server.errors import InvalidError

MOST_MERGED = 10_000
"""Most entries of a mapping after `<<` merges. Without a limit, a few lines could fill any memory, because each line
may double the last.
"""

_LONGEST = 300
_QUOTED = re.compile(r"""(['"])(?!(utf-\d+|<[a-z ]+>|\\?.)\1).*\1""")
"""Text of a document that a parser quotes, which may be a key. Single characters and the parser's own names are no such
text.
"""


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.YAMLError(f"a mapping has more than {MOST_MERGED} entries")


def read_yaml(content: str | bytes) -> object:
    """Parses a YAML document.

    Raises:
        InvalidError: It is not YAML.
    """
    try:
        return yaml.load(content, _Loader)
    except Exception as error:  # PyYAML also lets out errors of int(), date() and the like
        raise InvalidError(f"it is not YAML: {_without_quotes(error)}") from error


def read_json(content: str | bytes) -> object:
    """Parses a JSON document.

    Raises:
        InvalidError: It is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"it is not JSON: {_without_quotes(error)}") from error


def sentence(error: Exception) -> str:
    """The text of a foreign error as one short line."""
    return " ".join((str(error) or type(error).__name__).split())[:_LONGEST]


def _without_quotes(error: Exception) -> str:
    text = sentence(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:  # its text quotes the line
        text = f"{error.problem}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return _QUOTED.sub("...", text)
