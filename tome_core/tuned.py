"""Tuned numbers: norms and biases that recover the accuracy that merging costs, one set for each band of `r`.

The matrices stay, and so do all numbers at an `r` outside the bands: there, answers are bit for bit the same.
`tome_core.tuning` makes such sets from photos without labels. A file stores them with a description of their making.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tome_core.families import Family
from tome_core.whole_file import write_whole

FORMAT = "tome-tuned-1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Allowed dtypes of a model when its tuned numbers are loaded."""


class TunedError(ValueError):
    """A file has no tuned numbers, or those of another model; the message says which."""


class Band(NamedTuple):
    """Tuned numbers and their range of `r`.

    Attributes:
        low: The smallest `r`. A schedule counts by its mean over all blocks.
        high: The largest `r`.
        tensors: By their names in the timm model, (C,) each, float32 on the CPU.
    """

    low: int
    high: int
    tensors: Mapping[str, Tensor]

    def __contains__(self, r: object) -> bool:
        return isinstance(r, int) and self.low <= r <= self.high


class Tuned(NamedTuple):
    """Tuned numbers of a model.

    Attributes:
        bands: In order of `r`, without overlap.
        weights: `fingerprint` of their model, by the name of its dtype.
        about: How they were made and what they gained, as a JSON object.
    """

    bands: Sequence[Band]
    weights: Mapping[str, str]
    about: Mapping[str, Any]

    def check(self, model: nn.Module, family: Family, found: str | None = None) -> None:
        """Refuses another model or other weights.

        Args:
            model: The timm model, in one of `DTYPES`.
            family: Its adapter.
            found: `fingerprint` of the model, if known.

        Raises:
            TunedError: They were made for another model or other weights.
        """
        own = tunable(model, family)
        for band in self.bands:
            for name, tensor in band.tensors.items():
                if name not in own:
                    raise TunedError(f"made for another model: this one has no norm or bias {name!r}")
                if own[name].shape != tensor.shape:
                    raise TunedError(f"made for another model: {name} has {len(tensor)} numbers, not {len(own[name])}")
        dtype = _name(next(model.parameters()).dtype)
        if dtype not in self.weights:
            raise TunedError(f"made for a model in {' or '.join(self.weights) or 'no dtype'}; this one is {dtype}")
        found = found or fingerprint(model)
        if self.weights[dtype] != found:
            raise TunedError(
                f"made with other weights or for another image size ({self.weights[dtype][:12]}, not {found[:12]})"
            )

    def save(self, file: Path | str) -> None:
        """Writes them as one safetensors file. A reader sees the old file or the new one.

        Raises:
            OSError: The file cannot be written.
        """
        tensors = {
            f"{band.low}-{band.high}.{name}": tensor.detach().clone(memory_format=torch.contiguous_format)
            for band in self.bands
            for name, tensor in band.tensors.items()
        }
        facts = {"bands": [[b.low, b.high] for b in self.bands], "weights": self.weights, "about": self.about}
        content = save(tensors, {"format": FORMAT} | {name: json.dumps(fact) for name, fact in facts.items()})
        write_whole(Path(file), content)  # # safetensors' own writing raises no OSError

    @staticmethod
    def load(file: Path | str) -> Tuned:
        """Reads a file of `save`.

        Raises:
            TunedError: The file has other contents.
            OSError: The file cannot be read.
        """
        with open(file, "rb"):
            pass  # # safetensors' error hides the reason
        try:
            with safe_open(file, framework="pt") as opened:
                # # Clones do not lie in the mapped file, which may be truncated while they are in use.
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
                return _parsed(opened.metadata() or {}, tensors)
        except (SafetensorError, ValueError, RecursionError) as error:  # # RecursionError: JSON with too many levels
            raise TunedError(f"{file} holds no tuned numbers: {error}") from None


def tunable(model: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """The parameters of a timm model that can be tuned: norms, biases and LayerScale of its blocks, and its final norm.

    The head is not one of them: it reads the features of every `r` alike.
    """
    parts = [*family.blocks(model), family.norm(model)]
    own = {id(parameter) for part in parts for parameter in part.parameters() if parameter.ndim == 1}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def sharing(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with other tensors for some parameters, which shares everything else with the original.

    Layers without such a parameter are the same objects. Layers with one share their hooks (also later ones), buffers
    and matrices. A parameter that is reassigned later is not shared, nor is a plain attribute.

    Args:
        module: Any module.
        tensors: By the names of the parameters that they replace, as in `named_parameters`. A parameter with several
            names is replaced under all of them.
    """
    replaced = {id(own): tensors[name] for name, own in module.named_parameters() if name in tensors}
    return _sharing(module, replaced, {})


def _sharing(module: nn.Module, replaced: Mapping[int, Tensor], twins: dict[int, nn.Module]) -> nn.Module:
    """Arguments by `id`: the replacements of parameters, and the copies of modules that occur again."""
    if id(module) in twins:
        return twins[id(module)]
    parameters = {name: replaced.get(id(own), own) for name, own in module._parameters.items()}
    children = {
        name: None if child is None else _sharing(child, replaced, twins) for name, child in module._modules.items()
    }
    twin = module
    if _differ(parameters, module._parameters) or _differ(children, module._modules):
        twin = copy(module)
        # # Both have the same dicts of hooks, so later hooks reach both. For a full backward hook torch also sets a
        # flag, which only the module itself would get.
        full = module._is_full_backward_hook is not False
        twin.__dict__ |= {"_parameters": parameters, "_modules": children, "_is_full_backward_hook": full}
    twins[id(module)] = twin
    return twin


def _differ(some: Mapping[str, object], others: Mapping[str, object]) -> bool:
    return any(each is not others[name] for name, each in some.items())


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A sha256 of everything that a model has learned: names, shapes and numbers.

    Args:
        model: A timm model.
        dtype: The numbers are converted to it first; None keeps theirs.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """`fingerprint` of a float32 model in each of `DTYPES`, by the dtype's name."""
    return {_name(dtype): fingerprint(model, dtype) for dtype in DTYPES}


def _parsed(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Tuned:
    """Parses the contents of `Tuned.save`.

    Raises:
        ValueError: They are something else; the message says what is wrong.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}; this version reads {FORMAT!r}")
    if missing := {"bands", "weights", "about"} - metadata.keys():
        raise ValueError(f"its metadata lacks {', '.join(sorted(missing))}")
    said, weights, about = (json.loads(metadata[name]) for name in ("bands", "weights", "about"))
    if not isinstance(weights, dict) or not all(isinstance(digest, str) for digest in weights.values()):
        raise ValueError("its weights must be a sha256 for each dtype")
    if not isinstance(about, dict):
        raise ValueError("what it says about itself must be a JSON object")
    for name, tensor in tensors.items():
        if tensor.ndim != 1 or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"{name} must be one row of finite float32 numbers")
    bands = [Band(low, high, _within(f"{low}-{high}.", tensors)) for low, high in _ranges(said)]
    if not all(band.tensors for band in bands) or sum(len(band.tensors) for band in bands) != len(tensors):
        raise ValueError(f"its bands are {said}; each must have numbers, and all numbers must have a band")
    return Tuned(bands, weights, about)


def _ranges(said: Any) -> list[tuple[int, int]]:
    """The lowest and highest `r` of the bands.

    Raises:
        ValueError: They are not ranges.
    """
    found: list[tuple[int, int]] = []
    for pair in said if isinstance(said, list) else ():
        match pair:
            case [int(low), int(high)] if low <= high and (found[-1][1] if found else 0) < low:
                found.append((low, high))
    if not found or len(found) != len(said) or any(type(r) is bool for pair in said for r in pair):
        raise ValueError(f"its bands are {said}; they must be [low, high] each, 1 or more, in order and apart")
    return found


def _within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
