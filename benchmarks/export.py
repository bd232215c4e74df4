"""Exported ONNX files in onnxruntime against torch: the same top-1 on every photo, and the speed of both.

python -m benchmarks.export --model NAME --weights FILE --data FOLDER --r 0 8 13 16

FOLDER is as for benchmarks.accuracy. Both run in float32 on the CPU with torch's number of threads, batch by batch in
turn. The last line is JSON: {"rows": [{"r", "batch_size", "same_top1", "images", "largest_difference", ...}]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import read_photos, share
from server.device.models import LoadedModel, load_model
from server.images.preprocessing import Preprocessing
from server.model_spec import ModelSpec
from tome_core import FixedR, export_onnx
from tome_core.quiet import onnxruntime

Answer = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled", help="as for tome-server serve (default: bundled)")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument("--r", type=int, nargs="+", default=[0, 8, 13, 16], metavar="R", help="values of r")
    parser.add_argument("--batch-sizes", default="8,32", help="images in a batch (default: 8,32)")
    parser.add_argument("--limit", type=int, help="use this many photos")
    args = parser.parse_args()

    loaded = load_model(ModelSpec.model_validate({"source": args.model, "weights": args.weights}))
    pixels, labels = read_photos(args.data, loaded.info, args.limit)
    print(f"{loaded.info.name}, {len(pixels)} photos of {args.data.name}, {torch.get_num_threads()} threads")
    print(f"{'':>20} {'largest':>11} {'top-1 %':>15} {'images/s':>15}")
    print(f"{'r':>4} {'batch':>5} {'same':>9} {'difference':>11} {'torch':>7} {'onnx':>7} {'torch':>7} {'onnx':>7}")
    rows = []
    for r in args.r:
        runners = {"torch": torch_runner(loaded, r), "onnx": onnx_runner(loaded, r)}
        for batch_size in map(int, args.batch_sizes.split(",")):
            row = {"r": r, "batch_size": batch_size}
            row |= measure(runners, pixels, labels, loaded.info.preprocessing, batch_size)
            rows.append(row)
            same = f"{row['same_top1']}/{row['images']}"
            faster = row["images_per_s_onnx"] / row["images_per_s_torch"]
            print(
                f"{r:>4} {batch_size:>5} {same:>9} {row['largest_difference']:>11.1e} "
                f"{100 * row['top1_torch']:>7.1f} {100 * row['top1_onnx']:>7.1f} "
                f"{row['images_per_s_torch']:>7.1f} {row['images_per_s_onnx']:>7.1f} {faster:>5.2f}x",
                flush=True,
            )
    print(json.dumps({"model": loaded.info.name, "rows": rows}))


def torch_runner(loaded: LoadedModel, r: int) -> Answer:
    """Torch, eager, on the CPU."""
    return torch.inference_mode()(FixedR(loaded.merged, r).forward)


def onnx_runner(loaded: LoadedModel, r: int) -> Answer:
    """The same model from a file, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        written = export_onnx(loaded.merged, r, loaded.info.preprocessing.input_size, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(written.path, options, providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return answer


def measure(
    runners: dict[str, Answer],
    pixels: Sequence[bytes],
    labels: Sequence[int],
    preprocessing: Preprocessing,
    batch_size: int,
) -> dict[str, Any]:
    """Runs every batch through both, in turn, so that other load of the machine affects both alike."""
    guesses: dict[str, list[int]] = {name: [] for name in runners}
    per_image_s: dict[str, list[float]] = {name: [] for name in runners}
    differences = []
    for at in range(-batch_size, len(pixels), batch_size):  # the first round is warm-up: its batch comes again
        images = normalised(pixels[max(at, 0) : max(at, 0) + batch_size], preprocessing)
        logits = {}
        for name, answer in runners.items():
            start = time.perf_counter()
            logits[name] = answer(images)
            if at >= 0:
                per_image_s[name].append((time.perf_counter() - start) / len(images))
                guesses[name] += logits[name].argmax(dim=1).tolist()
        differences.append((logits["torch"] - logits["onnx"]).abs().max().item())
    return {
        "images": len(pixels),
        "same_top1": sum(a == b for a, b in zip(guesses["torch"], guesses["onnx"], strict=True)),
        "largest_difference": max(differences),
        **{f"top1_{name}": share(guesses[name], labels) for name in runners},
        **{f"images_per_s_{name}": 1 / statistics.median(per_image_s[name]) for name in runners},
    }


def normalised(pixels: Sequence[bytes], preprocessing: Preprocessing) -> Tensor:
    """RGB bytes to images (B, 3, H, W) float32, by the metadata of an exported file."""
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    packed = np.frombuffer(b"".join(pixels), np.uint8).reshape(len(pixels), *preprocessing.input_size, 3)
    images = (packed / np.float32(255) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


if __name__ == "__main__":
    main()
