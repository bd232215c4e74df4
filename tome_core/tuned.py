"""Tuned numbers: norms and biases that give a model back what merging costs, a set for each band of `r`.

The matrices stay, and so does every number at an `r` outside the bands: below them answers do not change by a bit.
`tome_core.tuning` makes such sets from photos without labels; a file keeps them with what they were made for.
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

FORMAT = "tome-tuned-1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a model may have been brought to before its tuned numbers are loaded."""


class TunedError(ValueError):
    """A file holds no tuned numbers, or those of another model; the message says which."""


class Band(NamedTuple):
    """Tuned numbers, and the `r` that they are for.

    Attributes:
        low: The smallest `r`. A schedule belongs where its mean over all blocks does.
        high: The largest.
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
        bands: In order of `r`; no two of them meet.
        weights: `fingerprint` of the model that they were made for, by the name of its dtype.
        about: How they were made and what they gave, as JSON holds it.
    """

    bands: Sequence[Band]
    weights: Mapping[str, str]
    about: Mapping[str, Any]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuses another model, or other weights.

        Args:
            model: The timm model, in one of `DTYPES`.
            family: Its adapter.

        Raises:
            TunedError: They were made for another.
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
            raise TunedError(f"the model is {dtype}; load them while it is {', '.join(map(_name, DTYPES))}")
        if self.weights[dtype] != (found := fingerprint(model)):
            raise TunedError(f"made with other weights ({self.weights[dtype][:12]}, not {found[:12]})")

    def save(self, file: Path | str) -> None:
        """Writes them as one safetensors file; who reads it meanwhile sees the old one or the new one.

        Raises:
            OSError: The file cannot be written.
        """
        file = Path(file)
        tensors = {f"{b.low}-{b.high}.{name}": t.contiguous() for b in self.bands for name, t in b.tensors.items()}
        facts = {"bands": [[b.low, b.high] for b in self.bands], "weights": self.weights, "about": self.about}
        unfinished = file.with_name(f"{file.name}.new")
        said = {"format": FORMAT} | {name: json.dumps(fact) for name, fact in facts.items()}
        unfinished.write_bytes(save(tensors, said))  # save_file raises no OSError
        unfinished.replace(file)

    @staticmethod
    def load(file: Path | str) -> Tuned:
        """Reads what `save` wrote.

        Raises:
            TunedError: It did not write this.
            OSError: The file cannot be read.
        """
        with open(file, "rb"):
            pass  # safetensors raises no OSError that tells what is wrong
        try:
            with safe_open(file, framework="pt") as opened:
                facts: dict[str, str] = opened.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise TunedError(f"{file} holds no tuned numbers that this version reads ({FORMAT})")
                bands, weights, about = (json.loads(facts[name]) for name in ("bands", "weights", "about"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return Tuned(_bands(bands, tensors), {str(k): str(v) for k, v in weights.items()}, dict(about))
        except TunedError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise TunedError(f"{file} holds no tuned numbers: {error}") from None


def tunable(model: nn.Module, family: Family) -> dict[str, nn.Parameter]:
    """The numbers of a timm model that can be tuned: norms, biases and LayerScale of its blocks, and its final norm.

    The head is not among them: it reads the features of every `r` alike.
    """
    parts = [*family.blocks(model), family.norm(model)]
    own = {id(parameter) for part in parts for parameter in part.parameters() if parameter.ndim == 1}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def sharing(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with other tensors in the place of some parameters, and everything else shared with the one given.

    Layers without such a parameter are the very same; those with one share their hooks, buffers and matrices.

    Args:
        module: Any module.
        tensors: By the names of the parameters that they replace.
    """
    return _sharing(module, tensors, "")


def _sharing(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    if not any(name.startswith(prefix) for name in tensors):
        return module
    twin = copy(module)
    own = {name: tensors.get(prefix + name, parameter) for name, parameter in module._parameters.items()}
    twin.__dict__["_parameters"] = own
    twin.__dict__["_modules"] = {
        name: child and _sharing(child, tensors, f"{prefix}{name}.") for name, child in module._modules.items()
    }
    return twin


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A sha256 of all that a model has learned: names, shapes and numbers.

    Args:
        model: A timm model.
        dtype: Of the numbers as they are counted; None takes them as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprints(model: nn.Module) -> dict[str, str]:
    """`fingerprint` of a float32 model in every dtype that it may be brought to, by the dtype's name."""
    return {_name(dtype): fingerprint(model, dtype) for dtype in DTYPES}


def _bands(said: Any, tensors: Mapping[str, Tensor]) -> list[Band]:
    bands: list[Band] = []
    for low, high in said:
        prefix = f"{low}-{high}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if not 1 <= low <= high or not own or (bands and low <= bands[-1].high):
            raise ValueError(f"its bands are {said}; each must begin above 0 and the one before, and hold numbers")
        bands.append(Band(low, high, own))
    for name, tensor in tensors.items():
        if tensor.ndim != 1 or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"{name} must be one row of finite float32 numbers")
    return bands


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
