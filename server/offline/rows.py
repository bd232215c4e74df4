"""Answers to rows of a table: one row for each file, with its answer or its error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.ipc.messages import Embed, TopK, Vector
from server.offline.model import Answer, Ask, schedule_of
from server.types import ModelInfo

Row = dict[str, Any]

_COMMON = ("file", "model", "r", "tuned")


@dataclass(frozen=True)
class Table:
    """The common values of all rows of a run.

    Args:
        info: The model.
        ask: The request for every image.
        normalize: Whether to scale vectors to length 1.
    """

    info: ModelInfo
    ask: Ask
    normalize: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""
        return (*_COMMON, *self._answers, "error")

    @property
    def _answers(self) -> tuple[str, ...]:
        if isinstance(self.ask, Embed):
            return ("vector",)
        return ("label", "index", "score", *(("top_k",) if self.ask.top_k > 1 else ()))

    def rows(self, files: Sequence[str], answers: Sequence[Answer]) -> Iterator[Row]:
        """Yields a row for each file."""
        r, names = schedule_of(self.ask), self._answers
        same = {"model": self.info.name, "r": list(r), "tuned": self.info.is_tuned(r)}
        nothing: Row = {"file": "", **same, **dict.fromkeys(names), "error": None}
        has_top_k = "top_k" in names
        for file, answer in zip(files, answers, strict=True):
            row = nothing.copy()
            row["file"] = printable(file)
            if isinstance(answer, TopK):
                found = self.info.named(answer.indices, answer.scores)
                if found:
                    row.update(found[0])
                if has_top_k:
                    row["top_k"] = found
            elif isinstance(answer, Vector):
                row["vector"] = self._vector(answer)
            else:
                row["error"] = answer
            yield row

    def _vector(self, answer: Vector) -> Any:
        import numpy as np

        vector = np.frombuffer(answer.values, "<f4")
        length = float(np.linalg.norm(vector)) if self.normalize else 1.0
        return vector / np.float32(length) if length else vector


def printable(file: str) -> str:
    """A path as text for a table: bytes that are not UTF-8 become escapes."""
    return file if file.isascii() else os.fsencode(file).decode("utf-8", "backslashreplace")
