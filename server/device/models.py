"""Model sources (bundled, timm names, `hf-hub:`, `local-dir:`, weights files) to loaded models. No pickle is read."""

from __future__ import annotations

import hashlib
import logging
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch

import tome_core
from server import model_config
from server.device import weights
from server.device.class_labels import class_labels
from server.device.tuned_file import served
from server.device.unfilled import Unfilled
from server.documents import sentence
from server.errors import SettingsError, shown
from server.images.preprocessing import Preprocessing
from server.model_config import BUNDLED, WEIGHTS_FILE, Described, ImageConfig, checked, read_config, weights_in
from server.model_config import FILE as CONFIG_FILE
from server.model_spec import ModelSpec
from server.types import ModelInfo
from server.versions import UNVERSIONED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to merge, and its description for the HTTP processes.

    Attributes:
        weights: The file of its weights; None for random ones.
        tuned: sha256 of the file of its tuned numbers; None without them.
        tuned_file: The file of its tuned numbers; None without them.
    """

    merged: tome_core.MergedViT
    info: ModelInfo
    weights: Path | None = None
    tuned: str | None = None
    tuned_file: Path | None = None

    def weights_sha256(self) -> str | None:
        """The hash of the weights' file, which is read each time; None for random ones."""
        if self.weights is None:
            return None
        with self.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: a folder, a repository of the hub, or timm's own collection.

    Attributes:
        name: The source as it was given.
        folder: The folder; None for other sources.
        repo, revision: Those on the hub; empty for other sources.
    """

    name: str
    folder: Path | None = None
    repo: str = ""
    revision: str = ""

    @staticmethod
    def of(source: str) -> _Source:
        kind, _, rest = source.partition(":")
        if source == "bundled":
            return _Source(source, BUNDLED)
        if kind == "local-dir":
            return _Source(source, Path(rest))
        if kind in ("hf-hub", "hf_hub"):
            repo, _, revision = rest.partition("@")
            return _Source(source, repo=repo, revision=revision)
        return _Source(source)

    def describe(self) -> Described:
        """The description of a model for timm."""
        if self.folder is not None or self.repo:
            file = self._config_file()
            described = read_config(file)
            if not timm.is_model(described.architecture):
                raise SettingsError(f"{file}: timm has no architecture {shown(described.architecture)}")
            return described
        if not timm.is_model(self.name):
            raise SettingsError(
                f"timm has no model {shown(self.name)}; a model is bundled, a name of timm's, hf-hub:ORG/NAME or "
                "local-dir:FOLDER"
            )
        return Described(self.name)

    def _config_file(self) -> Path:
        if self.folder is None:
            return _fetched(self, self.repo, self.revision, CONFIG_FILE)
        return self.folder / CONFIG_FILE

    def weights_file(self, pretrained_cfg: Mapping[str, Any]) -> Path:
        """The file of the source's weights. Those of a hub are downloaded, or taken from its cache."""
        if self.folder is not None:
            return weights_in(self.folder)
        repo, revision = self.repo, self.revision
        if not repo:
            repo, _, revision = str(pretrained_cfg.get("hf_hub_id") or "").partition("@")
        if not repo:
            raise SettingsError(f"{self.name} comes without weights on the hub; give a file with weights=")
        return _fetched(self, repo, revision, WEIGHTS_FILE)


def _fetched(source: _Source, repo: str, revision: str, file: str) -> Path:
    from huggingface_hub import constants, hf_hub_download  # on demand: it is slow to import, and most models are local

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each retry
    host = urlsplit(constants.ENDPOINT).hostname or ""
    reachable = _is_reachable(host)
    try:
        return Path(hf_hub_download(repo, file, revision=revision or None, local_files_only=not reachable))
    except (OSError, ValueError) as error:
        why = sentence(error) if reachable else f"{host} has no address here, and the hub's cache has no such file"
        hint = "; give a file with weights=" if file == WEIGHTS_FILE else ""
        raise SettingsError(f"{source.name}: cannot fetch {file} of {repo} ({why}){hint}") from error


def _is_reachable(host: str) -> bool:
    """Whether the hub's name has an address or there is a proxy. The hub's library would retry for a minute."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def load_model(spec: ModelSpec, state_dir: Path | None = None) -> LoadedModel:
    """Builds a model, loads its weights and tuned numbers, and reads its preprocessing and label names.

    Args:
        spec: The model.
        state_dir: The folder of tuned numbers that have no place beside the weights.

    Raises:
        SettingsError: The source is unknown, its weights are not available or do not fit, tokens cannot merge in it, or
            the named tuned numbers cannot be used. The message is one line.
    """
    try:
        return _load(spec, state_dir)
    except SettingsError as error:
        raise SettingsError(f"model {spec.name}: {error}") from error


def _load(spec: ModelSpec, state_dir: Path | None) -> LoadedModel:
    model_config.check_files(spec)
    source = _Source.of(spec.source)
    described = source.describe()
    with torch.device("meta"), Unfilled():  # shapes alone: any size takes no memory and no time
        plan, images = _sized(described)
    labels = class_labels(described.label_names, described.label_descriptions, plan.num_classes)
    file = None
    if spec.weights == "random":
        logger.warning("%s has random weights: its answers mean nothing", spec.name)
        model, _ = _sized(described)
    else:
        file = Path(spec.weights) if spec.weights else source.weights_file(plan.pretrained_cfg)
        state = weights.read_weights(file, plan)
        with Unfilled():
            model, _ = _sized(described)
        model.load_state_dict(state)
    merged = tome_core.wrap(model).eval()
    found = served(spec, merged, file, state_dir)
    if found is not None:
        merged.take_tuned(found.tuned)
        logger.info("model %s: tuned numbers of %s", spec.name, found.file)
    info = ModelInfo(
        name=spec.name,
        architecture=model.pretrained_cfg.get("architecture", type(model).__name__),
        source=spec.source,
        labels=labels,
        preprocessing=images,
        num_blocks=merged.num_blocks,
        num_tokens=merged.num_tokens,
        num_prefix_tokens=merged.num_prefix_tokens,
        max_r=merged.max_r,
        tuned=tuple((band.low, band.high) for band in found.tuned.bands) if found else (),
        num_features=merged.num_features,
        activation=described.activation,
        version=spec.version or UNVERSIONED,
    )
    return LoadedModel(merged, info, file, found and found.sha256, found and found.file)


def _sized(described: Described) -> tuple[Any, Preprocessing]:
    """A model for images of the size in its configuration, and the preprocessing of its images."""
    model = _built(described, {})
    images = checked(ImageConfig, model.pretrained_cfg, "its configuration")
    wanted, takes = images.input_size[1:], _own_size(model)
    if takes is not None and takes != wanted and images.fixed_input_size:
        wanted = takes  # as in timm: the model's arguments count more than the configuration of its weights
    if takes is not None and takes != wanted:
        if "img_size" in described.args and model.patch_embed.strict_img_size:
            raise SettingsError(
                f"its configuration names images of {_text(wanted)} px (input_size), and a model that takes "
                f"{_text(takes)} px (img_size)"
            )
        model = _built(described, {"img_size": wanted})
    if wanted[0] != wanted[1]:
        raise SettingsError(f"it takes images of {_text(wanted)} px; they must be square")
    resize = math.floor(wanted[0] / images.crop_pct)
    preprocessing = Preprocessing(
        input_size=wanted,
        resize_size=(resize, resize),
        crop_mode=images.crop_mode,
        interpolation=images.interpolation,
        mean=images.mean,
        std=images.std,
    )
    return model, preprocessing


def _built(described: Described, more: Mapping[str, Any]) -> Any:
    """A timm model in which tokens can merge, with a head that is right for merged tokens.

    Raises:
        SettingsError: timm cannot build it, or tokens cannot merge in it.
    """
    try:
        model: Any = timm.create_model(
            described.architecture, pretrained_cfg=described.pretrained_cfg, **{**described.args, **more}
        )
        merged = tome_core.wrap(model)
        merged.family.check_head(model)
    except Exception as error:  # timm's layers raise any error for wrong arguments
        said = f" with {shown(dict(described.args))}" if described.args else ""
        raise SettingsError(f"cannot build {described.architecture!r}{said}: {sentence(error)}") from error
    return model


def _own_size(model: Any) -> tuple[int, int] | None:
    """Height and width that the model was built for; None if it takes any size."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
