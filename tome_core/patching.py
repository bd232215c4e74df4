"""Makes a timm model itself merge, for existing scripts: `tome_core.patch(model, r=16)`, then `model(images)`."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from torch import nn

from tome_core.schedule import RLike
from tome_core.vit import Kernels, MergedViT, wrap

M = TypeVar("M", bound=nn.Module)

OWN = "_merged"
"""The attribute of a patched model that holds its merging twin."""


class Patched:
    """The methods of a patched model that differ from timm's. `model.r = 8` sets its `r`."""

    @property
    def r(self) -> RLike:
        """Tokens merged in each block: a number, a list of one per block, or a Ramp."""
        return _twin(self).r

    @r.setter
    def r(self, r: RLike) -> None:
        _twin(self).r = r

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `MergedViT.forward`."""
        return _twin(self)(*args, **kwargs)

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """As `MergedViT.forward_features`."""
        return _twin(self).forward_features(*args, **kwargs)

    def forward_head(self, *args: Any, **kwargs: Any) -> Any:
        """As `MergedViT.forward_head`."""
        return _twin(self).forward_head(*args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """As `MergedViT.forward_intermediates`."""
        return _twin(self).forward_intermediates(*args, **kwargs)

    def get_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        """As `MergedViT.get_intermediate_layers`."""
        return _twin(self).get_intermediate_layers(*args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Copies and pickles the original timm model, which is then patched again."""
        own = {name: value for name, value in self.__dict__.items() if name != OWN}
        return patch, (_as(_twin(self).model.__class__, own), self.r, _twin(self)._kernels)


def patch(model: M, r: RLike = 0, kernels: Kernels = "auto") -> M:
    """Makes a timm model itself merge tokens: same object, same parameters and names, another `forward`.

    `wrap` gives a second module and leaves the model as it was; prefer it in new code.

    Args:
        model: A timm Vision Transformer. If it is patched already, only its `r` is set.
        r: Tokens merged in each block: a number, a list of one per block, or a Ramp. `model.r = ...` changes it.
        kernels: As for `wrap`.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: As `wrap` raises it.
        ValueError: r is negative, or lists more blocks than there are.
        TypeError: r is neither an integer, a sequence of integers nor a Ramp.
    """
    if not isinstance(model, Patched):
        # Two objects share one state. This one computes as timm's class does, and sees every change of the model.
        cls: Any = type(model)
        merged = wrap(_as(cls, model.__dict__), kernels)
        merged.r = r
        model.__dict__[OWN] = merged
        model.__class__ = _patched(cls)
    else:
        model.r = r
    return model


@cache
def _patched(cls: Any) -> Any:
    return type(f"Patched{cls.__name__}", (Patched, cls), {"__module__": cls.__module__})


def _as(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """An object of a class with an existing state."""
    made: nn.Module = object.__new__(cls)
    made.__dict__ = state
    return made


def _twin(model: Any) -> MergedViT:
    merged: MergedViT = model.__dict__[OWN]
    return merged
