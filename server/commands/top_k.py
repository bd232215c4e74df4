"""How many classes a command names, and by which scores."""

from __future__ import annotations

import argparse
from typing import get_args

from server.errors import SettingsError
from server.types import Activation, ModelInfo


def add_class_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Declares the flags that `named_classes` reads.

    Args:
        parser: Of the command.
        default: How many classes are named where no flag says so.
    """
    parser.add_argument("--top-k", type=int, help=f"classes to name (default: {default}, or with --threshold all)")
    parser.add_argument(
        "--function-to-apply",
        choices=get_args(Activation),
        help="what makes scores of logits (default: the model's own, softmax or, with several labels, sigmoid)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="with sigmoid, in place of --top-k: the least score of a class to name",
    )


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
