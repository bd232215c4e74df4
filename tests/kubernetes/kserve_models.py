"""Holds documents of KServe against the models of its Python package, which are generated from its API's description.

A program of its own: the package registers the messages of its protocol by names that other clients take as well, and
only one of them may be in a process. It reads a list of documents and prints what is wrong with them, both as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from kserve import models
from kubernetes.client import models as kubernetes_models

_SCALARS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def problems(kind: str, value: object, place: str) -> Iterator[str]:
    """What does not fit, by its place in the document."""
    if scalar := _SCALARS.get(kind):
        if not isinstance(value, scalar) or (isinstance(value, bool) and kind != "bool"):
            yield f"{place}: {value!r} is no {kind}"
    elif found := re.fullmatch(r"list\[(.+)\]", kind):
        for index, item in enumerate(value) if isinstance(value, list) else ():
            yield from problems(found[1], item, f"{place}[{index}]")
        if not isinstance(value, list):
            yield f"{place}: {value!r} is no list"
    elif found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        for name, item in value.items() if isinstance(value, dict) else ():
            yield from problems(found[1], item, f"{place}.{name}")
        if not isinstance(value, dict):
            yield f"{place}: {value!r} is no mapping"
    elif model := getattr(models, kind, None) or getattr(kubernetes_models, kind, None):
        yield from _of_model(model, value, place)


def _of_model(model: Any, value: object, place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place}: {value!r} is no mapping"
        return
    fields = {written: name for name, written in model.attribute_map.items()}
    for written in value.keys() - fields.keys():
        yield f"{place}: there is no {written!r}"
    known = {fields[written]: item for written, item in value.items() if written in fields}
    try:
        model(**known)
    except ValueError as error:  # a field that is required, or a value that is none of those allowed
        yield f"{place}: {error}"
    for name, item in known.items():
        yield from problems(model.openapi_types[name], item, f"{place}.{model.attribute_map[name]}")


if __name__ == "__main__":
    found: list[str] = []
    for document in json.load(sys.stdin):
        version = document["apiVersion"].removeprefix("serving.kserve.io/").capitalize()
        found += problems(f"{version}{document['kind']}", document, document["kind"])
    json.dump(found, sys.stdout)
