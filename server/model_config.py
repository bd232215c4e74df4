"""The files of a model folder, checked without timm and torch: every error is one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.documents import read_json
from server.errors import InvalidError, SettingsError, shown
from server.model_spec import ModelSpec
from server.types import Activation

BUNDLED = Path(__file__).parent / "bundled"
FILE = "config.json"
NEEDED = "a model folder holds config.json with 'architecture', a name of timm's, and model.safetensors"
MOST_BYTES = 16 << 20
"""Of a config.json: 22,000 classes with their descriptions take 2 MB."""

_EITHER_PLACE = ("num_classes", "label_names", "label_descriptions", "problem_type", "function_to_apply")
_MOST_BLOCKS = 1000
_LARGEST = 1_000_000
OF_TIMM = frozenset(
    {"model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
    | {"scriptable", "exportable", "no_jit"}
)
"""Arguments of `timm.create_model` that no model takes."""

WEIGHTS_FILE = "model.safetensors"
TUNED_SUFFIX = ".tuned.safetensors"
_INDEX = f"{WEIGHTS_FILE}.index.json"

Side = Annotated[int, Field(ge=1, le=4096)]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(ge=0.001, le=1)]
Read = TypeVar("Read", bound=BaseModel)


class ImageConfig(BaseModel):
    """How a model wants its images; the names and the defaults are those of timm's `pretrained_cfg`."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    input_size: tuple[Side, Side, Side] = (3, 224, 224)
    fixed_input_size: bool = False
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop_pct: float = Field(0.875, ge=0.1, le=1)
    crop_mode: Literal["center", "squash"] = "center"
    mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    std: tuple[Std, Std, Std] = (0.229, 0.224, 0.225)


class _File(BaseModel):
    """What is read of config.json."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    architecture: str
    num_classes: int | None = Field(None, ge=0, le=_LARGEST)
    model_args: dict[str, Any] = {}
    pretrained_cfg: dict[str, Any]
    label_names: Any = None
    label_descriptions: Any = None
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = None
    function_to_apply: Activation | None = None


@dataclass(frozen=True)
class Described:
    """What timm is to build.

    Attributes:
        architecture: A name of timm's.
        args: What the model is built with.
        pretrained_cfg: What goes with its weights; None for what timm itself has under that name.
        label_names, label_descriptions: Of the classes, as they are written; None where nothing is said.
        activation: What makes scores of the model's logits.
    """

    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] | None = None
    label_names: object = None
    label_descriptions: object = None
    activation: Activation = "softmax"


def read_config(file: Path) -> Described:
    """Reads config.json.

    Raises:
        SettingsError: timm cannot build a model of it, or it does not say how images are prepared.
    """
    config = _content(file)
    if "architecture" not in config:
        if "model_type" in config or "architectures" in config:
            raise SettingsError(
                f"{file.parent} is a folder of Hugging Face transformers ({shown(config.get('model_type'))}); "
                f"{NEEDED}, as timm.models.save_for_hf writes them"
            )
        raise SettingsError(f"{file} names no 'architecture'; {NEEDED}")
    if config.get("pretrained_cfg") is None:
        if "mean" not in config:  # timm once wrote all in one mapping
            raise SettingsError(
                f"{file} has no 'pretrained_cfg', which says how images are prepared: input_size, mean, std, "
                "interpolation, crop_pct"
            )
        config = {**config, "pretrained_cfg": config, "label_names": config.get("label_names", config.get("labels"))}
    if isinstance(config["pretrained_cfg"], dict):  # what may stand there too
        inner = {name: config["pretrained_cfg"].get(name) for name in _EITHER_PLACE}
        config = inner | _without_null(config)
    read = checked(_File, config, str(file))
    args, pretrained_cfg = _without_null(read.model_args), _without_null(read.pretrained_cfg)
    _check_args(args, str(file))
    size = pretrained_cfg.get("input_size", [3, *_pair(args["img_size"])] if "img_size" in args else None)
    channels = args.get("in_chans", size[0] if isinstance(size, list) and size else 3)
    if channels != 3:
        raise SettingsError(f"{file}: the model takes images of {shown(channels)} channels; they must have 3, for RGB")
    images = checked(ImageConfig, pretrained_cfg | {"input_size": size}, f"{file}: pretrained_cfg")
    takes_any = args.get("dynamic_img_size") or args.get("strict_img_size") is False
    known = images.model_dump() | {
        "architecture": read.architecture,
        "input_size": (3, *images.input_size[1:]),
        "fixed_input_size": images.fixed_input_size and not takes_any,
    }
    if read.num_classes is not None:
        known["num_classes"] = read.num_classes
    activation = read.function_to_apply
    if activation is None:
        activation = "sigmoid" if read.problem_type == "multi_label_classification" else "softmax"
    return Described(read.architecture, args, known, read.label_names, read.label_descriptions, activation)


def check_files(spec: ModelSpec) -> None:
    """Checks the local files of a model as far as that needs no torch.

    Raises:
        SettingsError: A file or folder is missing, or config.json is wrong.
    """
    kind, _, rest = spec.source.partition(":")
    if kind == "local-dir" and not rest:
        raise SettingsError("local-dir: names no folder")
    folder = BUNDLED if spec.source == "bundled" else Path(rest) if kind == "local-dir" else None
    if folder is not None:
        if not folder.is_dir():
            raise SettingsError(f"there is no folder {folder}; {NEEDED}")
        read_config(folder / FILE)
    if spec.weights not in (None, "random") and not Path(str(spec.weights)).is_file():
        raise SettingsError(f"there is no weights file {spec.weights}")
    if folder is not None and spec.weights is None:
        weights_in(folder)


def weights_in(folder: Path) -> Path:
    """The weights file of a model folder: model.safetensors, or the only one that ends so; tuned numbers are none.

    Raises:
        SettingsError: There is none, or nobody can tell which.
    """
    if (folder / WEIGHTS_FILE).exists():
        return folder / WEIGHTS_FILE
    if (folder / _INDEX).exists():
        raise SettingsError(f"{folder} has its weights in parts ({_INDEX}); they must be one file, {WEIGHTS_FILE}")
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    files = [name for name in names if not name.endswith(TUNED_SUFFIX)]
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise SettingsError(
            f"{folder} has several weights files ({', '.join(files[:3])}); one must be named {WEIGHTS_FILE}"
        )
    raise SettingsError(f"{folder} has no {WEIGHTS_FILE}; weights are read from safetensors only")


def checked(kind: type[Read], values: Mapping[str, Any], where: str) -> Read:
    """Values in their types and ranges; null counts as not said.

    Args:
        kind: Names, types and ranges.
        values: What was written.
        where: What the message calls the place.

    Raises:
        SettingsError: One of them is wrong.
    """
    try:
        return kind.model_validate(_without_null(values))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise SettingsError(f"{where}: {name}: {problem['msg']} (got {shown(problem['input'])})") from None


def _content(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError(f"there is no {file}; {NEEDED}") from None
    except (OSError, ValueError) as error:  # ValueError: a path that can be none
        raise SettingsError(f"{file} cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(content) > MOST_BYTES:
        raise SettingsError(f"{file} has more than {MOST_BYTES} bytes")
    try:
        config = read_json(content)
    except InvalidError as error:
        raise SettingsError(f"{file} cannot be read: {error.message}") from None
    if not isinstance(config, dict):
        raise SettingsError(f"{file} holds no mapping but {shown(config)}")
    return config


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_args(args: Mapping[str, Any], file: str) -> None:
    """Refuses what would have timm read other files, or build for ever."""
    for name, value in args.items():
        where = f"{file}: model_args.{name}"
        if name in OF_TIMM:
            raise SettingsError(f"{where}: it is no argument of a model")
        least, most = (1, _MOST_BLOCKS) if name.startswith("depth") else (-_LARGEST, _LARGEST)
        for number in _numbers(value):
            if not math.isfinite(number) or not least <= number <= most:
                raise SettingsError(f"{where} is {shown(number)}; it must lie between {least} and {most}")


def _pair(size: object) -> list[object]:
    return list(size) if isinstance(size, list) else [size, size]


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in _numbers(each)]
    return [value] if isinstance(value, int | float) else []
