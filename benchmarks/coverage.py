"""Checks every model name of timm: merged correctly, refused by name, or wrong; on any device, in any precision.

python -m benchmarks.coverage [--names PATTERN]
python -m benchmarks.coverage --device cuda --dtype bf16 [--names PATTERN]

A supported model is built small with random parameters and must pass three checks. At r=0 its logits are timm's. With r
> 0 the promised number of tokens leaves, and sizes add up. Without positions, an image of identical patches gives the
same logits at any r; a fault in a family's use of sizes, in attention or in pooling would change them. (Matching and
merging, which all families share, have their own tests.) The last line is JSON: {"names", "supported", "equal_at_r0",
"merged", "refused", "crashed", "wrong"}.

With a device or a dtype the question is another: do the models run there, and lose no more than timm's own do? Each
runs as users run it (on the CPU by the fused loop if possible) at r=0, a middle r and the largest. Its logits are
compared with float32 on the CPU, with the parameters rounded to the dtype: at r=0 with timm's model, otherwise with
ours, run plain and under the same matching, because another choice of pairs is no error. A model that raises is
"crashed". It is "wrong" if the difference, relative to the largest logit, exceeds 3 times the loss of timm's own model
in that dtype on that device at r=0, plus a floor. That loss shows how well-conditioned a model is. The floor, the last
bit of a logit in half precision, covers models with a small loss by chance. All differences on an H200 were below half
of the limit; attention that ignores sizes exceeds it for all of 70 names in fp16, and for all but one in bf16. If
timm's own model cannot run, its loss counts as the floor. Names of classes that no family serves count as refused
without being built; the first command asks `wrap`. The JSON gains "device", "dtype" and "fused", the number that ran
so. "equal_at_r0" counts correct names at r=0, "merged" correct names at both others.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from benchmarks.forward import DTYPES
from benchmarks.same_matching import recorded, replayed
from tome_core import MergedViT, UnsupportedModelError, wrap
from tome_core.families import FAMILIES
from tome_core.matching import MergePlan

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
SERVED = {cls.__name__ for family in FAMILIES for cls in family.model_classes}
COARSE = ("patch32", "_s32_", "_r_s16_", "_mci_")  # patches, or strides of a stem, that do not divide 112
STEM_DECIDES_WIDTH = ("vitamin_", "vit_base_mci_")
TOLERANCE = 1e-4  # of the largest logit
FLOORS = {"fp32": TOLERANCE, "bf16": 2**-7, "fp16": 2**-10}  # of the largest logit; in half precision its last bit
MARGIN = 3  # times the loss of timm's own model


class Verdict(NamedTuple):
    """The result of one name.

    Attributes:
        name: timm's name.
        cls: The model's class.
        equal: Whether r=0 gives timm's logits.
        merged: Whether r > 0 merges correctly.
        reason: Why it was refused, or what went wrong; empty for a supported model.
        refused: Whether `wrap` refuses it.
        crashed: Whether it raised on the requested device.
        implementation: "fused" or "plain" on that device; empty if it never ran.
    """

    name: str
    cls: str
    equal: bool = False
    merged: bool = False
    reason: str = ""
    refused: bool = False
    crashed: bool = False
    implementation: str = ""


class Run(NamedTuple):
    """A run on the requested device: its r, its logits in float32 on the CPU, and its merges."""

    r: int
    logits: Tensor
    plans: list[MergePlan]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", default="", help="timm's pattern, such as '*dinov3*' (default: all names)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="run them there (default with --dtype: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="run them in it (default with --device: fp32)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    how = {"device": args.device or "cpu", "dtype": args.dtype or "fp32"} if args.device or args.dtype else {}
    verdicts = []
    for name in timm.list_models(args.names):
        verdicts.append(examine_on(name, **how) if how else examine(name))
        if sys.stderr.isatty():
            print(f"\r{len(verdicts)} {name:<60}", end="", file=sys.stderr, flush=True)
    report(verdicts, how)


def report(verdicts: list[Verdict], how: dict[str, str]) -> None:
    """Prints the results: a table by class, the names to repair, and JSON.

    Args:
        verdicts: One for each name.
        how: "device" and "dtype", if they were requested.
    """
    supported = [v for v in verdicts if v.equal and v.merged]
    refused = [v for v in verdicts if v.refused]
    crashed = [v for v in verdicts if v.crashed]
    wrong = [v for v in verdicts if not (v.equal and v.merged or v.refused or v.crashed)]
    columns = {"supported": (supported, 9), "refused": (refused, 8), "crashed": (crashed, 8), "wrong": (wrong, 6)}
    if not how:
        del columns["crashed"]
    counts = {title: Counter(v.cls for v in group) for title, (group, _) in columns.items()}
    listed = {v.cls for v in verdicts if not v.refused}
    others = Counter({"refused": sum(v.cls not in listed for v in refused)})
    print(f"{'class':<32}", *(f"{title:>{width}}" for title, (_, width) in columns.items()))
    for cls in sorted(listed):
        print(f"{cls:<32}", *(f"{counts[title][cls]:>{width}}" for title, (_, width) in columns.items()))
    print(f"{'all other classes':<32}", *(f"{others[title]:>{width}}" for title, (_, width) in columns.items()))
    ran = Counter(v.implementation for v in verdicts)
    if how:
        print(f"{ran['fused']} ran fused, {ran['plain']} plain")
    for title, group in (("crashed", crashed), ("wrong", wrong)):
        for verdict in group:
            print(f"{title}: {verdict.name}: {verdict.reason}")
    summary = {
        "names": len(verdicts),
        "supported": len(supported),
        "equal_at_r0": sum(v.equal for v in verdicts),
        "merged": sum(v.merged for v in verdicts),
        "refused": len(refused),
        "crashed": len(crashed),
        "wrong": len(wrong),
    }
    print(json.dumps(summary | (how | {"fused": ran["fused"]} if how else {})))


@torch.inference_mode()
def examine(name: str) -> Verdict:
    """Builds one model, small if it may be supported, and checks it."""
    admitted = admit(name)
    if isinstance(admitted, Verdict):
        return admitted
    model, side = admitted
    cls = type(model).__name__
    try:
        merged = wrap(model)
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


def examine_on(name: str, device: str, dtype: str) -> Verdict:
    """Builds one small model, and compares its results on a device in a dtype with float32 on the CPU.

    Args:
        name: timm's name.
        device: torch's name of the device.
        dtype: A key of `DTYPES`.
    """
    if not says_supported(name):
        return Verdict(name, declared(name), reason="no family serves its class", refused=True)
    admitted = admit(name)
    if isinstance(admitted, Verdict):
        return admitted
    model, side = admitted
    images = torch.randn(2, 3, side, side).to(DTYPES[dtype])
    wide = copy.deepcopy(model).to(DTYPES[dtype]).float()
    runs: list[Run] = []
    implementation, at, crash = "", "before it ran", ""
    try:
        model, there = model.to(device, DTYPES[dtype]), images.to(device)
        merged = as_users_do(model, device)
        for r in (0, merged.max_r // 2, merged.max_r):
            at = f"r={r}"
            with torch.inference_mode(), recorded() as plans:
                implementation = merged.implementation(there).name
                logits = merged(there, r).float().cpu()
            runs.append(Run(r, logits, plans))
    except Exception as error:
        crash = f"{at}: {said(error)}"
    lost = loss_of_timm(model, wide, images, device)
    tolerance = MARGIN * (FLOORS[dtype] if lost is None else lost) + FLOORS[dtype]
    faults = [fault(run, wide, images.float(), tolerance) for run in runs]
    reason = crash or next(filter(None, faults), "")
    beside = "timm's own model cannot run" if lost is None else f"timm's own model loses {lost:.1e} at r=0"
    return Verdict(
        name,
        type(model).__name__,
        equal=faults[:1] == [""],
        merged=not crash and not any(faults[1:]),
        reason=f"{reason}; {beside}" if reason else "",
        crashed=bool(crash),
        implementation=implementation,
    )


def as_users_do(model: nn.Module, device: str) -> MergedViT:
    """Wraps a model as users do; on the CPU, which has no kernels, in the fused loop all the same."""
    try:
        return wrap(model, "fused" if device == "cpu" else "auto")
    except UnsupportedModelError:
        return wrap(model)


@torch.inference_mode()
def loss_of_timm(narrow: nn.Module, wide: nn.Module, images: Tensor, device: str) -> float | None:
    """The loss of timm's own model, as a share of the largest logit; None if it cannot run or is not finite."""
    try:
        lost = distance(narrow(images.to(device)).float().cpu(), wide(images.float()))
    except Exception:
        return None
    return lost if math.isfinite(lost) else None


@torch.inference_mode()
def fault(run: Run, wide: nn.Module, images: Tensor, tolerance: float) -> str:
    """The fault of a run, compared with the float32 model under the same matching; empty if there is none."""
    try:
        with replayed(run.plans):
            expected = wrap(wide, "plain")(images, run.r) if run.r else wide(images)
    except Exception as error:
        return f"r={run.r}: float32 beside it: {said(error)}"
    return differs(run.logits, expected, f"r={run.r}", tolerance)[1]


def said(error: Exception) -> str:
    """The first line of an error, and its place, because an assertion has nothing else."""
    first_line, _, _ = str(error).partition("\n")
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line} ({Path(place.filename).name}:{place.lineno})"


def admit(name: str) -> Verdict | tuple[nn.Module, int]:
    """The result of `build`; a verdict if the model cannot be built, or `wrap` refuses it."""
    try:
        model, side = build(name)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return Verdict(name, "", reason=f"cannot build it: {type(error).__name__}: {error}")
    try:
        wrap(model).family.check_head(model)
    except UnsupportedModelError as error:
        return Verdict(name, type(model).__name__, reason=str(error), refused=True)
    return model, side


def build(name: str) -> tuple[nn.Module, int]:
    """A model of that name and the side of its images: small, with random parameters that all matter. A model of a
    class that no family serves is built in full size but without memory.
    """
    if not says_supported(name):
        with torch.device("meta"):
            return timm.create_model(name), 0
    torch.manual_seed(0)
    overrides = dict(SMALL)
    if name.startswith(STEM_DECIDES_WIDTH):
        del overrides["embed_dim"], overrides["num_heads"]
    if "sapiens2" in name:
        overrides["num_kv_heads"] = 1  # otherwise a list of one for each of its many blocks
    if name.startswith("naflexvit_"):  # counts its tokens at the size of its training
        model: Any = timm.create_model(name, **overrides)
        side = model.pretrained_cfg["input_size"][-1]
    else:
        side = 112 if not any(coarse in name for coarse in COARSE) else 224
        model = timm.create_model(name, img_size=side, **overrides)
    randomise(model)
    return model.eval(), side


def says_supported(name: str) -> bool:
    """Whether timm declares that the name gives a class that a family serves."""
    return declared(name) in SERVED


def declared(name: str) -> str:
    """The class that timm declares for the name."""
    annotation = inspect.signature(timm.models.model_entrypoint(name)).return_annotation
    return str(getattr(annotation, "__name__", annotation))


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Gives weights the scale of their fan-in, and biases, norms and LayerScale non-trivial values."""
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim <= 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def differs(given: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> tuple[bool, str]:
    """Whether two tensors of logits are equal, and the message if not."""
    error = distance(given, expected)
    return (True, "") if error <= tolerance else (False, f"{what}: logits differ by {error:.1e} of the largest")


def distance(given: Tensor, expected: Tensor) -> float:
    """The largest difference between logits, as a share of the largest of them."""
    return ((given - expected).abs().max() / expected.abs().max()).item()


def miscounts(merged: MergedViT, image: Tensor, r: int = 5) -> str:
    """The fault in the number of tokens or their sizes; empty if there is none."""
    tokens = merged.forward_tokens(image, r, track=True)
    if tokens.size is None or tokens.source is None:
        return f"r={r} merges nothing"
    if tokens.x.shape[1] != merged.token_counts(r)[-1]:
        return f"r={r} leaves {tokens.x.shape[1]} tokens, not {merged.token_counts(r)[-1]}"
    if tokens.size.sum().item() != tokens.source.shape[1]:
        return f"r={r}: sizes add up to {tokens.size.sum().item()}, not {tokens.source.shape[1]}"
    return ""


def neutralise(merged: MergedViT) -> None:
    """Removes positions: embeddings and biases become zero, rotations the identity."""
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
    """A rotary table without rotation: sines 0, cosines 1."""

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
