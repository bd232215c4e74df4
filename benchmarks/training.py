"""Training speed: a step of the plain timm model, and of ours at each `r`.

python -m benchmarks.training --model vit_small_patch16_224 --batch-size 256 --r 0 8 13 16

A step is forward, backward and AdamW on random images and labels, eager, under bfloat16 autocast on a GPU and in
float32 on the CPU. The last line is JSON: {"rows": [{"impl", "r", "images_per_s", "ms", "speedup"}]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import tome_core

WARM_UP = 3  # steps of each


class Contender(NamedTuple):
    """A timed combination: a name, an `r`, and images to logits."""

    impl: str
    r: int
    forward: Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm name")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--r", type=int, nargs="+", default=[0, 8, 13, 16], metavar="R", help="values of r")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    args = parser.parse_args()

    device = torch.device(args.device)
    model = timm.create_model(args.model).to(device).train()
    rows = measure(model, contenders(model, args.r), args.batch_size, args.steps)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model}, training, batch {args.batch_size}, {machine}, torch {torch.__version__}")
    print(f"{'':>6} {'r':>4} {'ms a step':>10} {'images/s':>9} {'speed-up':>9}")
    for row in rows:
        print(f"{row['impl']:>6} {row['r']:>4} {row['ms']:>10.1f} {row['images_per_s']:>9.1f} {row['speedup']:>8.2f}x")
    print(json.dumps({"model": args.model, "rows": rows}))


def contenders(model: nn.Module, ladder: Sequence[int]) -> list[Contender]:
    """The plain model, which is the baseline, and ours at each `r`; they share their weights."""
    merged = tome_core.wrap(model)

    def under(r: int) -> Callable[[Tensor], Tensor]:
        return lambda images: merged(images, r)

    return [Contender("timm", 0, model), *(Contender("ours", r, under(r)) for r in dict.fromkeys(ladder))]


def measure(model: Any, all_of: Sequence[Contender], batch_size: int, steps: int) -> list[dict[str, Any]]:
    """One row for each contender, the baseline first; they run in turn, so that a disturbance affects all alike."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    images = torch.randn(batch_size, *resolve_model_data_config(model)["input_size"], device=device)
    labels = torch.randint(model.num_classes, (batch_size,), device=device)
    took_s: list[list[float]] = [[] for _ in all_of]
    for step in range(-WARM_UP, steps):
        for contender, times in zip(all_of, took_s, strict=True):
            _wait_for(device)
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(contender.forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _wait_for(device)
            if step >= 0:
                times.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in took_s]
    return [
        {
            "impl": contender.impl,
            "r": contender.r,
            "images_per_s": batch_size / median_s,
            "ms": 1000 * median_s,
            "speedup": medians[0] / median_s,
        }
        for contender, median_s in zip(all_of, medians, strict=True)
    ]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
