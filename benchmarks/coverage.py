"""Every model name of timm: merged rightly, refused by name, or wrong.

python -m benchmarks.coverage [--names PATTERN]

A supported model is built small with random parameters and must pass three checks: at r=0 its logits are timm's; with
r > 0 as many tokens leave as promised and sizes add up; and with positions taken away, an image whose patches are all
alike gives the same logits at any r, which no fault in matching, weighting, attention or pooling survives. The last
line is JSON: {"names", "supported", "equal_at_r0", "merged", "refused", "wrong"}.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections import Counter
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from tome_core import MergedViT, UnsupportedModelError, wrap
from tome_core.families import FAMILIES

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
SERVED = {cls.__name__ for family in FAMILIES for cls in family.model_classes}
COARSE = ("patch32", "_s32_", "_r_s16_", "_mci_")  # patches, or strides of a stem, that do not divide 112
STEM_DECIDES_WIDTH = ("vitamin_", "vit_base_mci_")
TOLERANCE = 1e-4  # of the largest logit


class Verdict(NamedTuple):
    """What became of one name.

    Attributes:
        name: timm's name.
        cls: The model's class.
        equal: Whether r=0 gives timm's logits.
        merged: Whether r > 0 merges, and does it rightly.
        reason: Why it was refused, or what went wrong; empty for a supported model.
        refused: Whether `wrap` refused it.
    """

    name: str
    cls: str
    equal: bool = False
    merged: bool = False
    reason: str = ""
    refused: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", default="", help="timm's pattern, such as '*dinov3*' (default: all names)")
    args = parser.parse_args()
    verdicts = []
    for name in timm.list_models(args.names):
        verdicts.append(examine(name))
        if sys.stderr.isatty():
            print(f"\r{len(verdicts)} {name:<60}", end="", file=sys.stderr, flush=True)
    wrong = [v for v in verdicts if not v.refused and not (v.equal and v.merged)]
    supported = [v for v in verdicts if v.equal and v.merged]
    print(f"{'class':<32} {'supported':>9} {'refused':>8} {'wrong':>6}")
    counts = [Counter(v.cls for v in group) for group in (supported, [v for v in verdicts if v.refused], wrong)]
    for cls in sorted(counts[0] | counts[2]):
        print(f"{cls:<32} {counts[0][cls]:>9} {counts[1][cls]:>8} {counts[2][cls]:>6}")
    others = sum(n for cls, n in counts[1].items() if cls not in counts[0])
    print(f"{'all other classes':<32} {0:>9} {others:>8} {0:>6}")
    for verdict in wrong:
        print(f"wrong: {verdict.name}: {verdict.reason}")
    print(
        json.dumps(
            {
                "names": len(verdicts),
                "supported": len(supported),
                "equal_at_r0": sum(v.equal for v in verdicts),
                "merged": sum(v.merged for v in verdicts),
                "refused": sum(v.refused for v in verdicts),
                "wrong": len(wrong),
            }
        )
    )


@torch.inference_mode()
def examine(name: str) -> Verdict:
    """Builds one model, small where it may be supported, and checks it."""
    try:
        model, side = build(name)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return Verdict(name, "", reason=f"cannot build it: {type(error).__name__}: {error}")
    cls = type(model).__name__
    try:
        merged = wrap(model)
    except UnsupportedModelError as error:
        return Verdict(name, cls, reason=str(error), refused=True)
    try:
        image = torch.randn(1, 3, side, side)
        equal, reason = differs(merged(image), model(image), "r=0")
        counted = miscounts(merged, image)
        neutralise(merged)
        alike = image[:, :, :1, :1].expand_as(image)
        same, changed = True, ""
        for r in (5, 1000):
            same_at_r, changed_at_r = differs(merged(alike, r), model(alike), f"identical patches at r={r}")
            same, changed = same and same_at_r, changed or changed_at_r
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return Verdict(name, cls, reason=f"{type(error).__name__}: {error}")
    return Verdict(name, cls, equal, same and not counted, reason or counted or changed)


def build(name: str) -> tuple[nn.Module, int]:
    """A model of that name and the side of its images: small, with random parameters that all matter, or, of a class
    that no family serves, as it is but without memory."""
    if not says_supported(name):
        with torch.device("meta"):
            return timm.create_model(name), 0
    torch.manual_seed(0)
    overrides = dict(SMALL)
    if name.startswith(STEM_DECIDES_WIDTH):
        del overrides["embed_dim"], overrides["num_heads"]
    if "sapiens2" in name:
        overrides["num_kv_heads"] = 1  # else a list of one for each of its many blocks
    if name.startswith("naflexvit_"):  # counts its tokens at the size that its weights were trained at
        model: Any = timm.create_model(name, **overrides)
        side = model.pretrained_cfg["input_size"][-1]
    else:
        side = 112 if not any(coarse in name for coarse in COARSE) else 224
        model = timm.create_model(name, img_size=side, **overrides)
    randomise(model)
    return model.eval(), side


def says_supported(name: str) -> bool:
    """Whether timm declares that the name gives a class that a family serves."""
    declared = inspect.signature(timm.models.model_entrypoint(name)).return_annotation
    return getattr(declared, "__name__", declared) in SERVED


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Gives weights the scale of their fan-in, and no bias, norm or LayerScale its trivial start."""
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim <= 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def differs(given: Tensor, expected: Tensor, what: str) -> tuple[bool, str]:
    """Whether two tensors of logits are the same, and what to say if not."""
    error = ((given - expected).abs().max() / expected.abs().max()).item()
    return (True, "") if error <= TOLERANCE else (False, f"{what}: logits differ by {error:.1e} of the largest")


def miscounts(merged: MergedViT, image: Tensor, r: int = 5) -> str:
    """What is wrong with the tokens left and their sizes; empty if nothing."""
    tokens = merged.forward_features(image, r, track=True)
    if tokens.size is None or tokens.source is None:
        return f"r={r} merges nothing"
    if tokens.x.shape[1] != merged.token_counts(r)[-1]:
        return f"r={r} leaves {tokens.x.shape[1]} tokens, not {merged.token_counts(r)[-1]}"
    if tokens.size.sum().item() != tokens.source.shape[1]:
        return f"r={r}: sizes add up to {tokens.size.sum().item()}, not {tokens.source.shape[1]}"
    return ""


def neutralise(merged: MergedViT) -> None:
    """Takes positions away: embeddings and biases become zero, rotations nothing."""
    model: Any = merged.model
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or "rel_pos" in name or "relative_position" in name:
            parameter.zero_()
    for module in model.modules():
        if hasattr(module, "get_embed"):
            module.get_embed = still(module.get_embed)
        if hasattr(module, "dynamic_feat_size") and hasattr(module, "backbone"):  # a convolutional stem sees borders
            module.forward = alike(module.forward)


def still(get_embed: Any) -> Any:
    """A rotary table that turns by nothing: sines 0, cosines 1."""

    def turned(*args: Any, **kwargs: Any) -> Tensor:
        sin, cos = get_embed(*args, **kwargs).chunk(2, dim=-1)
        return torch.cat([torch.zeros_like(sin), torch.ones_like(cos)], dim=-1)

    return turned


def alike(embed: Any) -> Any:
    """A patch embedding that gives every patch the first one's features."""

    def embedded(x: Tensor) -> Tensor:
        y: Tensor = embed(x)
        return y[:, :1].expand_as(y)

    return embedded


if __name__ == "__main__":
    main()
