"""How many classes a command names, and by which scores."""

from __future__ import annotations

import argparse

from server.settings import SettingsError
from server.types import Activation, ModelInfo


def named_classes(args: argparse.Namespace, info: ModelInfo, default: int | None = None) -> tuple[int, Activation]:
    """What `--top-k`, `--threshold` and `--function-to-apply` say: how many classes at most, and what makes scores.

    Args:
        args: Of the command line.
        info: The model.
        default: How many where neither flag says so; None for as many as a server names.

    Raises:
        SettingsError: The model has no classes.
        InvalidError: A flag is out of range, or they do not go together.
    """
    if not info.labels:
        raise SettingsError(
            f"{info.name} has no classifier, so it names no classes; 'tome-server run --embed' has vectors"
        )
    top_k = default if args.top_k is None and args.threshold is None else args.top_k
    activation: Activation = args.function_to_apply or info.activation
    return info.most_classes(activation, top_k, args.threshold), activation
