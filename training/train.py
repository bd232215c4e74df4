"""Trains the bundled model: a 64 px ViT-Ti with patch 4, merging a random `r` of tokens at each step.

python -m training.train --data FOLDER --run RUN [--teacher teacher.safetensors]

Prints its progress, keeps a checkpoint in RUN after every epoch, and goes on from there when started again;
`--stop-after-s` ends a long training in parts. The finished model is written by `training.export`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tome_core
from tome_core.families.blocks import Halves
from tome_core.families.vit import ViTFamily
from training.augment import augment, mix
from training.data import Split, load_labels, load_split
from training.replay import Backward, Replay
from training.teacher import enlarge, load_teacher

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {"img_size": 64, "patch_size": 4, "num_classes": 200}
LARGEST_R = 20  # 257 tokens and 12 blocks: 17 tokens are left
SHARE_OF_R0 = 0.3
DISTILLATION = 0.8  # share of the loss that comes from the teacher
TEMPERATURE = 2.0


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured on a stream of their own; all runs on it
    train = Split(*(tensor.to(device) for tensor in load_split(args.data, "train", args.cache)))
    num_classes = len(load_labels(args.data).wnids)
    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS).to(device).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.AdamW(decay_groups(model), lr=args.lr, betas=(0.9, 0.99), fused=device.type == "cuda")
    teacher: Any = load_teacher(args.teacher, num_classes).to(device) if args.teacher else None
    backward = backward_of(model, device)
    if device.type == "cuda":
        teacher = torch.compile(teacher) if teacher is not None else None
        backward = Replay(backward, range(LARGEST_R + 1))

    args.run.mkdir(parents=True, exist_ok=True)
    checkpoint, first_epoch, start = args.run / "checkpoint.pt", 0, time.monotonic()
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]
        print(f"resumed after epoch {first_epoch}", flush=True)
    torch.manual_seed(args.seed + first_epoch)  # a resumed run does not draw the same again

    steps = len(train.images) // args.batch_size
    if not steps:
        raise SystemExit(f"--batch-size is {args.batch_size}; there are {len(train.images)} images")
    for epoch in range(first_epoch, args.epochs):
        order = torch.randperm(len(train.images), device=device)[: steps * args.batch_size]
        total = torch.zeros((), device=device)
        for step, batch in enumerate(order.split(args.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + step / steps, args)
            x, targets = mix(augment(train.images[batch]), F.one_hot(train.labels[batch], num_classes).float())
            taught = None
            if teacher is not None:
                with torch.autocast(device.type, torch.bfloat16):
                    taught = teacher(enlarge(x))
            total += backward(x, targets, taught, random_r())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": epoch + 1}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").rename(checkpoint)
        elapsed_s = time.monotonic() - start
        print(f"epoch {epoch + 1}/{args.epochs} loss {total.item() / steps:.3f} {elapsed_s:.0f} s", flush=True)
        per_epoch_s = elapsed_s / (epoch + 1 - first_epoch)
        if args.stop_after_s and elapsed_s + per_epoch_s > args.stop_after_s:
            break


def backward_of(model: nn.Module, device: torch.device) -> Backward:
    """The forward and backward pass under a given `r`; gradients are zeroed in place, for graphs write to them."""
    merged = tome_core.wrap(model)
    if device.type == "cuda":
        # One compiled half-block serves every block and every r: the number of tokens is dynamic.
        halves = merged.family.halves(merged.family.blocks(model)[0])
        compiled: list[Any] = [torch.compile(half, dynamic=True) for half in halves[:2]]
        family: Any = ViTFamily()  # its own: other models share theirs
        family.halves = lambda block: Halves(*compiled)
        merged.family = family
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient

    def backward(images: Tensor, targets: Tensor, taught: Tensor | None, r: int) -> Tensor:
        torch._foreach_zero_(gradients)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(merged(images, r), targets, taught)
        loss.backward()
        return loss.detach()

    return backward


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files and classes.csv")
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--teacher", type=Path, help="weights written by training.teacher")
    parser.add_argument("--cache", type=Path, help="folder for decoded pixels")
    parser.add_argument("--epochs", type=int, default=165)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995, help="decay of the averaged weights, per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after-s", type=float, help="end early, after the epoch that would pass this time")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def random_r() -> int:
    """Every third step or so merges nothing; the others any r alike, so that the model is good at all of them."""
    return 0 if torch.rand(()) < SHARE_OF_R0 else int(torch.randint(1, LARGEST_R + 1, ()))


def loss_of(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """Cross entropy with the mixed labels and, with a teacher, agreement with what it says of the same pixels."""
    logits = logits.float()
    if teacher_logits is None:
        return F.cross_entropy(logits, targets, label_smoothing=0.1)
    taught = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, dim=1),
        F.log_softmax(teacher_logits.float() / TEMPERATURE, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return torch.lerp(F.cross_entropy(logits, targets), taught * TEMPERATURE**2, DISTILLATION)


def learning_rate(epoch: float, args: argparse.Namespace, warm_up: float = 5.0) -> float:
    """Linear warm-up, then a cosine down to a thousandth."""
    if epoch < warm_up:
        return float(args.lr * epoch / warm_up)
    progress = (epoch - warm_up) / max(args.epochs - warm_up, 1)
    return float(args.lr * (0.001 + 0.999 * (1 + math.cos(math.pi * progress)) / 2))


def decay_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, object]]:
    """Decay for matrices alone: not for biases, norms, the class token or positions."""
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "token" not in n and "pos_embed" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


if __name__ == "__main__":
    main()
