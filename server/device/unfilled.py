"""Makes modules without random first weights, because a file replaces them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_RANDOM = {"erfinv_", "normal_", "uniform_"} | {
    f"{kind}_{spread}_" for kind in ("kaiming", "xavier", "trunc") for spread in ("normal", "uniform")
}
_IN_PLACE = _RANDOM | {"add_", "clamp_", "div_", "fill_", "mul_", "sub_", "zero_"}
"""Functions that do nothing to a tensor on the meta device, which has no values."""


class Unfilled(TorchFunctionMode):
    """Inside this context, modules are made without first values. To compute them takes longer than to read a file.

    Every parameter must be loaded afterwards. Buffers that no file holds are not random, and get their values.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, Tensor) and _fills(func, target):
            return target
        return func(*args, **kwargs)


def _fills(func: Callable[..., Any], target: Tensor) -> bool:
    """Whether a function only gives a tensor its first values."""
    return getattr(func, "__name__", "") in (_IN_PLACE if target.is_meta else _RANDOM)
