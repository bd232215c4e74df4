"""Imports timm without torch's compiler, which takes longer to import than torch and timm together.

Two places import `torch._dynamo`: torchvision, for a check that it makes when regions are pooled, and timm's NaFlex
model, for a decorator that keeps functions out of compiled graphs. Both get a substitute that imports the
compiler when it is really needed. A process that has imported timm or the compiler before is left as it is.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_COMPILER, _UTILS = "torch._dynamo", "torch._dynamo.utils"


def import_timm() -> None:
    """Imports timm, and leaves everything else in torch and `sys.modules` as it was."""
    if "timm" in sys.modules or _COMPILER in sys.modules:
        return
    import torch

    stand_in, disable = _StandIn(_UTILS), torch.compiler.disable
    sys.modules[_UTILS] = stand_in
    torch.compiler.disable = _disable
    try:
        importlib.import_module("timm")
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(_UTILS) is stand_in:
            del sys.modules[_UTILS]


class _StandIn(ModuleType):
    """`torch._dynamo.utils`, which is imported when any other name is read from it."""

    @staticmethod
    def is_compile_supported(device_type: Any) -> Any:
        return importlib.import_module(_UTILS).is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such names
            raise AttributeError(name)
        if sys.modules.get(_UTILS) is self:
            del sys.modules[_UTILS]
        return getattr(importlib.import_module(_UTILS), name)


def _disable(function: Callable[..., Any] | None = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """`torch.compiler.disable`, which takes effect once the compiler is imported: nothing is compiled before that."""
    import torch

    if function is None:
        return functools.partial(_disable, recursive=recursive, reason=reason)
    plain = function

    @functools.cache
    def disabled() -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compiler.disable(plain, recursive, reason=reason)
        return made

    @functools.wraps(plain)
    def call(*values: Any, **named: Any) -> Any:
        return (disabled() if _COMPILER in sys.modules else plain)(*values, **named)

    return call


import_timm()
