"""Model sources (bundled, timm names, `hf-hub:`, `local-dir:`, weights files) to loaded models. No pickle is read."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import nn

import tome_core
from server.images.preprocessing import Preprocessing
from server.settings import ModelSpec, SettingsError
from server.types import ModelInfo

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).parents[1] / "bundled"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to merge, what the HTTP side must know of it, and its weights' file where they are not random."""

    merged: tome_core.MergedViT
    info: ModelInfo
    weights: Path | None = None


def load_model(spec: ModelSpec) -> LoadedModel:
    """Builds a model, loads its weights, and reads its preprocessing and label names.

    Raises:
        SettingsError: The source is unknown, its weights are not to be had or do not fit, or tokens cannot merge in it.
    """
    source = f"local-dir:{BUNDLED}" if spec.source == "bundled" else spec.source
    try:
        model: Any = timm.create_model(source, pretrained=False)
        merged = tome_core.wrap(model)
        merged.family.check_head(model)
    except (RuntimeError, ValueError, OSError, TypeError, KeyError) as error:
        raise SettingsError(f"model {spec.name}: cannot build {spec.source!r}: {error}") from error
    if not model.num_classes:
        raise SettingsError(f"model {spec.name}: {spec.source} has no classifier: it gives features, not classes")
    file = None
    if spec.weights == "random":
        logger.warning("%s has random weights: its answers mean nothing", spec.name)
    else:
        file = Path(spec.weights) if spec.weights else _weights_file(source, model.pretrained_cfg)
        _load_weights(model, spec, file)
    info = ModelInfo(
        name=spec.name,
        architecture=model.pretrained_cfg.get("architecture", type(model).__name__),
        source=spec.source,
        labels=_labels(spec, model),
        preprocessing=_preprocessing(spec, model),
        num_blocks=merged.num_blocks,
        num_tokens=merged.num_tokens,
        num_prefix_tokens=merged.num_prefix_tokens,
        max_r=merged.max_r,
    )
    return LoadedModel(merged.eval(), info, file)


def _weights_file(source: str, pretrained_cfg: Mapping[str, Any]) -> Path:
    """Where the source keeps its weights; from a hub they are downloaded, or taken from its cache."""
    if source.startswith("local-dir:"):
        file = Path(source.removeprefix("local-dir:")) / WEIGHTS_FILE
        if not file.exists():
            raise SettingsError(f"{source} has no {WEIGHTS_FILE}; weights are read from safetensors only")
        return file
    hub_id = str(pretrained_cfg.get("hf_hub_id") or "")
    if not hub_id:
        raise SettingsError(f"{source} comes without weights on the hub; give a file with weights=")
    from huggingface_hub import hf_hub_download  # on demand: it is slow to import, and most models are local

    repo, _, revision = hub_id.partition("@")
    try:
        return Path(hf_hub_download(repo, WEIGHTS_FILE, revision=revision or None))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{source}: cannot fetch {WEIGHTS_FILE} of {repo} ({error}); give a file with weights="
        ) from error


def _load_weights(model: nn.Module, spec: ModelSpec, file: Path) -> None:
    if not file.is_file():
        raise SettingsError(f"model {spec.name}: there is no weights file {file}")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise SettingsError(f"model {spec.name}: {file} is not a safetensors file ({error})") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SettingsError(f"model {spec.name}: the weights in {file} do not fit {spec.source}: {error}") from error


def _preprocessing(spec: ModelSpec, model: nn.Module) -> Preprocessing:
    config: dict[str, Any] = resolve_model_data_config(model)
    _, height, width = config["input_size"]
    if config["crop_mode"] not in ("center", "squash") or height != width:
        raise SettingsError(
            f"model {spec.name}: crop mode {config['crop_mode']!r} at {height} x {width} px is not supported; "
            "supported: 'center' and 'squash' at square sizes"
        )
    resize = math.floor(height / config["crop_pct"])
    return Preprocessing(
        input_size=(height, width),
        resize_size=(resize, resize),
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _labels(spec: ModelSpec, model: Any) -> tuple[str, ...]:
    """Words for each class: the model's own, else ImageNet's where the number of classes tells which, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names:
        if len(names) != model.num_classes:
            raise SettingsError(f"model {spec.name}: {len(names)} label names for {model.num_classes} classes")
        described = model.pretrained_cfg.get("label_descriptions") or {}
        return tuple(described.get(name, name) for name in names)
    subset = infer_imagenet_subset(model)
    if subset:
        return tuple(ImageNetInfo(subset).label_descriptions())
    return tuple(f"class {index}" for index in range(model.num_classes))
