"""The file of a stopped learning, which the same command resumes. It holds no pickle."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from server.tuning.learning import Progress
from tome_core.whole_file import write_whole

SUFFIX = ".unfinished"


def keep(file: Path, of: str, state: dict[str, Tensor], progress: Progress) -> None:
    """Writes the file that `take_up` reads. If the process is killed meanwhile, the old file stays.

    Args:
        file: The file.
        of: A hash of the model, the photos and the recipe; `take_up` must get the same.
        state: The tuner's state.
        progress: Progress so far.

    Raises:
        OSError: The file cannot be written.
    """
    tensors = state | {f"best {name}": tensor for name, tensor in progress.numbers.items()}
    plain = {name: value for name, value in vars(progress).items() if name != "numbers"}
    said = {"of": of, "progress": json.dumps(plain)}
    write_whole(file, save(tensors, said))


def take_up(file: Path, of: str) -> tuple[dict[str, Tensor], Progress] | None:
    """The tuner's state and the progress that `keep` wrote; None if there is no file of this learning."""
    try:
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata() or {}
            if said.get("of") != of:
                return None
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
            progress = Progress(**json.loads(said["progress"]))
    # Damaged, or of another version. RecursionError: JSON that is nested too deep.
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return None
    progress.numbers = {name.removeprefix("best "): t for name, t in tensors.items() if name.startswith("best ")}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("best ")}, progress


def remove(file: Path) -> None:
    """Removes the file, if it exists and may be removed."""
    with contextlib.suppress(OSError):
        file.unlink()
