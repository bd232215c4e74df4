"""What the tests of model folders share: a folder's config changed, and a folder loaded and asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from server.device.models import LoadedModel, load_model
from server.device.runner import Runner
from server.settings import ModelSpec


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def load(folder: Path, **more: Any) -> LoadedModel:
    """A folder's model."""
    return load_model(ModelSpec(source=f"local-dir:{folder}", **({"name": "mine"} | more)))


def classify(loaded: LoadedModel) -> tuple[list[str], list[float]]:
    """Warms the model up as a start does; gives the labels for one grey image, likeliest first, and their scores."""
    info = loaded.info
    runner = Runner({info.name: loaded}, "cpu", "fp32")
    key = info.batch_key(info.schedule(0))
    runner.warm_up(key)
    pixels = torch.full((1, *key.input_size, 3), 100, dtype=torch.uint8)
    ((indices, scores),) = runner.top_k(key, pixels, len(info.labels))
    return [info.labels[index] for index in indices], scores
