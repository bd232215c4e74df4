"""Fits an ImageNet ViT-Ti to the 200 classes at 224 px, to teach the bundled model. It is never shipped.

python -m training.teacher --data FOLDER --weights vit_tiny.safetensors --out teacher.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

from training.augment import augment, mix
from training.data import Labels, load_labels, load_split

ARCHITECTURE = "vit_tiny_patch16_224"


def enlarge(x: Tensor) -> Tensor:
    """The student's 64 px batch as the teacher sees it, at 224 px; both are normalised alike."""
    return F.interpolate(x, size=224, mode="bicubic", align_corners=False)


def load_teacher(weights: Path, num_classes: int) -> nn.Module:
    """A fitted teacher, frozen."""
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes)
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


def from_imagenet(weights: Path, labels: Labels) -> nn.Module:
    """The ImageNet model with its head cut down to our classes, which ImageNet all has."""
    state = load_file(weights)
    row = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}
    ours = torch.tensor([row[wnid] for wnid in labels.wnids])
    state["head.weight"], state["head.bias"] = state["head.weight"][ours], state["head.bias"][ours]
    model = timm.create_model(ARCHITECTURE, num_classes=len(ours), drop_path_rate=0.1)
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files and classes.csv")
    parser.add_argument("--weights", type=Path, required=True, help=f"{ARCHITECTURE} ImageNet-1k weights, safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder for decoded pixels")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    labels, device = load_labels(args.data), torch.device(args.device)
    model = from_imagenet(args.weights, labels).to(device).train()
    images, targets = (tensor.to(device) for tensor in load_split(args.data, "train", args.cache))
    steps = len(images) // args.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=device.type == "cuda")
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.15)
    compiled, start = torch.compile(model), time.monotonic()
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(images), device=device)[: steps * args.batch_size].split(args.batch_size):
            x, soft = mix(augment(images[batch]), F.one_hot(targets[batch], len(labels.wnids)).float())
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(compiled(enlarge(x)), soft, label_smoothing=0.1)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            plan.step()
        print(f"teacher epoch {epoch + 1}/{args.epochs} loss {loss:.3f} {time.monotonic() - start:.0f} s", flush=True)
    save_file(model.state_dict(), args.out)

    model.eval()
    images, targets = (tensor.to(device) for tensor in load_split(args.data, "val", args.cache))
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        guesses = [model(enlarge(x.float() / 127.5 - 1)).argmax(1) for x in images.split(500)]
    print(f"teacher top-1 {(torch.cat(guesses) == targets).float().mean():.4f}")


if __name__ == "__main__":
    main()
