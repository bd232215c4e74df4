"""The single `openvino.Core` of a process.

A `Core` gives the thread that first uses the CPU a signal stack, and frees that memory when the last of the `Core` and
its compiled models is dropped. If another thread drops it, or while a younger `Core` exists, a thread keeps a freed
signal stack: the next signal, such as SIGINT, then ends the process with a segmentation fault. So no `Core` is ever
dropped here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tome_core.quiet import openvino


@functools.cache
def core() -> openvino.Core:
    """The `Core` of this process. Any thread may use it."""
    from tome_core.quiet import openvino

    return openvino.Core()


@functools.cache
def add_operator(library: Path) -> None:
    """Adds a compiled operator to the `Core`, once; it stays.

    Args:
        library: The result of `build_operator`.

    Raises:
        RuntimeError: It cannot be loaded.
    """
    core().add_extension(library)
