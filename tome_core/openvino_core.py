"""The one `openvino.Core` of a process.

A `Core` gives the thread that first uses the CPU a signal stack of its own, and takes that memory back when the last of
it and of its compiled models is dropped. Dropped by another thread, or while a younger `Core` is there, it leaves a
thread with a signal stack that does not exist: the next signal, be it Ctrl-C, ends the process with a segmentation
fault. So no `Core` is ever dropped here.
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
    """Adds a compiled operator to it, once; it stays.

    Args:
        library: What `build_operator` gave.

    Raises:
        RuntimeError: It cannot be loaded.
    """
    core().add_extension(library)
