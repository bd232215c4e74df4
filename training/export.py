"""Writes a trained checkpoint as a model folder (Hugging Face layout, fp16 safetensors) and measures it at each `r`.

python -m training.export --data FOLDER --run RUN --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tome_core
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions
from tome_core.schedule import resolve
from training.data import Labels, Split, load_labels, load_split
from training.student import ARCHITECTURE, MODEL_ARGS

LADDER = [0, 4, 8, 12, 14, 16, 17, 18, 20, 21]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--cache", type=Path, help="folder for decoded pixels")
    parser.add_argument("--r", type=int, nargs="+", default=LADDER, metavar="R", help="values of r to measure")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    state = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)["average"]
    weights = {name: value.half() for name, value in state.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    config = config_of(load_labels(args.data))
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
    model.load_state_dict(load_file(args.out / "model.safetensors"))
    val = load_split(args.data, "val", args.cache)
    rows = measure(model.eval().to(args.device), val, args.r)
    for row in rows:
        print(
            f"r {row['r']:>2}  top-1 {row['top1']:.4f}  agreement {row['agreement']:.4f}  tokens {row['tokens']:>3}  "
            f"FLOPs {row['flops'] / rows[0]['flops']:.3f} of those at r=0"
        )
    print(json.dumps({"rows": rows}))


def config_of(labels: Labels) -> dict[str, object]:
    """timm's `config.json`: architecture, arguments, preprocessing, label names."""
    return {
        "architecture": ARCHITECTURE,
        "num_classes": MODEL_ARGS["num_classes"],
        "num_features": 192,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "tiny_imagenet_200",
            "input_size": [3, 64, 64],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "label_names": labels.wnids,
        "label_descriptions": dict(zip(labels.wnids, labels.names, strict=True)),
    }


@torch.inference_mode()
def measure(model: nn.Module, val: Split, ladder: list[int]) -> list[dict[str, float]]:
    """Top-1, and agreement with r=0, over a split in float32; tokens left and FLOPs of an image."""
    merged, device = tome_core.wrap(model), next(model.parameters()).device
    rows: list[dict[str, float]] = []
    guesses = {}
    for r in dict.fromkeys([0, *ladder]):
        batches = val.images.split(500)
        guesses[r] = torch.cat([merged(x.to(device).float() / 127.5 - 1, r).argmax(1).cpu() for x in batches])
        top1 = (guesses[r] == val.labels).float().mean().item()
        agreement = (guesses[r] == guesses[0]).float().mean().item()
        row = {"r": r, "top1": top1, "agreement": agreement, "tokens": merged.token_counts(r)[-1]}
        rows.append(row | {"flops": flops(dimensions(merged), resolve(r, merged.num_blocks))})
    return rows


if __name__ == "__main__":
    main()
