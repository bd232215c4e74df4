"""Fits an ImageNet ViT-Ti to the 200 classes at 224 px, as the teacher of the bundled model. It is never shipped.

python -m training.teacher --data FOLDER --weights vit_tiny.safetensors --out teacher.safetensors

Uses all GPUs. The last line has its top-1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.data.imagenet_info import ImageNetInfo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training.accuracy import top1
from training.augment import augment, mix
from training.data import Labels, Split, load_labels, load_split
from training.loss import Answer
from training.parallel import add_arguments, average_, clip_, flat_gradients, launch, mine, rank, reseed, say

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {"img_size": 224}


class Teacher:
    """A fitted model that answers for the student's images, enlarged to its own input size.

    Args:
        weights: Written by this program.
        num_classes: The number of classes that it was fitted to.
        device: Its device; on a GPU it is compiled and runs in bfloat16.
    """

    def __init__(self, weights: Path, num_classes: int, device: torch.device) -> None:
        self._model = cast(VisionTransformer, timm.create_model(ARCHITECTURE, num_classes=num_classes, **MODEL_ARGS))
        self._model.load_state_dict(load_file(weights))
        self._model.eval().requires_grad_(False).to(device)
        self._on_gpu = device.type == "cuda"
        features = self._model.forward_features
        self._features = torch.compile(features) if self._on_gpu else features
        self.width: int = self._model.num_features

    def __call__(self, images: Tensor) -> Answer:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._on_gpu):
            tokens = self._features(enlarge(images))
            return Answer(self._model.forward_head(tokens), tokens[:, 0])


def enlarge(x: Tensor) -> Tensor:
    """The student's 64 px batch at the teacher's 224 px; both are normalised alike."""
    return F.interpolate(x, size=MODEL_ARGS["img_size"], mode="bicubic", align_corners=False)


def from_imagenet(weights: Path, labels: Labels) -> nn.Module:
    """The ImageNet model with its head reduced to our classes, which are all in ImageNet."""
    state = load_file(weights)
    row = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}
    ours = torch.tensor([row[wnid] for wnid in labels.wnids])
    state["head.weight"], state["head.bias"] = state["head.weight"][ours], state["head.bias"][ours]
    model = timm.create_model(ARCHITECTURE, num_classes=len(ours), drop_path_rate=0.1, **MODEL_ARGS)
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files and classes.csv")
    parser.add_argument("--weights", type=Path, required=True, help=f"{ARCHITECTURE} ImageNet-1k weights, safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder for decoded pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=512, help="of all GPUs together")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    launch(work, parser.parse_args())


def work(device: torch.device, args: argparse.Namespace) -> None:
    """The work of each process."""
    labels = load_labels(args.data)
    model = from_imagenet(args.weights, labels).to(device)
    fit(model, load_split(args.data, "train", args.cache).to(device), args)
    if rank() == 0:  # in half precision it is small enough to copy around
        save_file({name: value.half() for name, value in model.state_dict().items()}, args.out)
    model.eval()
    val = load_split(args.data, "val", args.cache).to(device)
    say(f"teacher top-1 {top1(lambda x: model(enlarge(x)), val):.4f}")


def fit(model: nn.Module, train: Split, args: argparse.Namespace) -> None:
    """Cross entropy with mixed labels: one warm-up, one cosine down to zero."""
    model.train()
    images, targets, device = train.images, train.labels, train.images.device
    on_gpu, start = device.type == "cuda", time.monotonic()
    steps = len(images) // args.batch_size
    gradients = flat_gradients(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=on_gpu)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.15)
    classify = torch.compile(model) if on_gpu else model
    shared = reseed(args.seed)
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), generator=shared)[: steps * args.batch_size].to(device)
        for batch in map(mine, order.split(args.batch_size)):
            x, partner, share = mix(augment(images[batch]))
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                logits = classify(enlarge(x)).float()
            labels = F.one_hot(targets[batch], logits.shape[1]).float()
            labels = torch.lerp(labels, labels[partner], share[:, None])
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            gradients.zero_()
            loss.backward()
            clip_(average_(gradients))
            optimizer.step()
            plan.step()
        say(f"teacher epoch {epoch + 1}/{args.epochs} loss {loss:.3f} {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
