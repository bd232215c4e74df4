"""Kinds that are not Kubernetes' own, read by models that a package has generated from their definitions."""

from __future__ import annotations

from typing import Any

import pytest

_MODULES = {
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}


def kept(document: dict[str, Any]) -> dict[str, Any]:
    """What its kind knows of a document: all of it, where it is valid. Skips where the models are not installed.

    Raises:
        ValueError: A field is missing, or of the wrong type.
    """
    models = pytest.importorskip(_MODULES[document["apiVersion"]], reason="the models of this kind are not installed")
    read = getattr(models, document["kind"]).model_validate(document)
    known: dict[str, Any] = read.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return known
