"""The request of a command to its model: `r`, the number of classes, and their scores."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, get_args

from server.dial import AutoR, PlainR
from server.errors import SettingsError
from server.settings import Settings
from server.types import Activation, ModelInfo

if TYPE_CHECKING:
    from server.ipc.messages import Classify

OFFLINE_SETTINGS: tuple[str, ...] = (
    "model",
    "weights",
    "tuned",
    "r",
    "device",
    "precision",
    "backend",
    "decode",
    "threads",
    "max_batch_size",
    "state_dir",
)
"""The settings of commands that compute photos without a server (server/offline)."""


def add_class_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Declares the flags that `classification` reads.

    Args:
        parser: The command's parser.
        default: The default number of classes, for the help.
    """
    parser.add_argument(
        "--top-k", type=int, metavar="N", help=f"classes to name (default: {default}, or with --threshold all)"
    )
    parser.add_argument(
        "--function-to-apply",
        choices=get_args(Activation),
        help="makes scores of logits (default: softmax, or sigmoid for a model with several labels)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="with sigmoid, instead of --top-k: the least score of a class to name",
    )


def plain_r(settings: Settings) -> PlainR:
    """The `r` of the first model: a number, or a list of one per block. Call it before the model loads.

    Raises:
        SettingsError: It is `auto`.
    """
    r = settings.specs()[0].r or 0
    if isinstance(r, AutoR):
        raise SettingsError("--r is auto, which follows the load of a server; here it must be a number or a list")
    return r


def classification(
    settings: Settings, args: argparse.Namespace, info: ModelInfo, default: int | None = None
) -> Classify:
    """The request that `--r`, `--top-k`, `--threshold` and `--function-to-apply` describe, without images.

    Args:
        settings: The command's settings.
        args: The arguments of the command line.
        info: The model.
        default: The number of classes without a flag; None for a server's default.

    Raises:
        SettingsError: The model has no classes, or `r` is `auto`.
        InvalidError: A flag is out of range, or two flags exclude each other.
    """
    from server.ipc.messages import Classify

    if not info.labels:
        raise SettingsError(
            f"{info.name} has no classifier, so it names no classes; 'tome-server run --embed' writes vectors"
        )
    top_k = default if args.top_k is None and args.threshold is None else args.top_k
    activation: Activation = args.function_to_apply or info.activation
    return Classify(
        model=info.name,
        images=[],
        r=info.schedule(plain_r(settings)),
        deadline=math.inf,
        top_k=info.most_classes(activation, top_k, args.threshold),
        activation=activation,
        threshold=args.threshold,
    )
