"""The cost of half precision: the error against float64 under the same matching, and changed answers.

python -m benchmarks.precision --model vit_tiny_patch16_224 --weights FILE --data FOLDER --device cuda --dtype bf16

FOLDER is as for benchmarks.accuracy. The error is that of the logits, over their length, on the first photos; the
float64 model merges the pairs that the other one chose. Agreement is with float32 at the same `r`, with its own choice
of pairs. "float8" is ours with its products in float8, if the model and dtype allow it. The last line is JSON: {"rows":
[{"impl", "r", "error", "agreement"}]}.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tome_core
from benchmarks.accuracy import read_photos
from benchmarks.forward import DTYPES
from benchmarks.same_matching import recorded, replayed
from server.device.models import load_model
from server.model_spec import ModelSpec

IN_FLOAT64 = 16  # photos


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled", help="as for tome-server serve")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument("--r", type=int, nargs="+", default=[0, 8, 13, 16], metavar="R", help="values of r")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--limit", type=int, help="use this many photos")
    args = parser.parse_args()

    loaded = load_model(ModelSpec(source=args.model, weights=args.weights, name="model"))
    preprocessing = loaded.info.preprocessing
    pixels, _ = read_photos(args.data, loaded.info, args.limit)
    stacked = torch.stack([torch.frombuffer(bytearray(p), dtype=torch.uint8) for p in pixels])
    images = stacked.view(-1, *preprocessing.input_size, 3).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(t)[:, None, None] for t in (preprocessing.mean, preprocessing.std))
    images = ((images - mean) / std).to(args.device)
    rows = list(measure(loaded.merged.model, images, args.r, DTYPES[args.dtype]))
    print(f"{args.model}, {args.dtype} on {args.device}, {len(images)} photos")
    print(f"{'':>6} {'r':>3} {'error':>9} {'agree %':>8}")
    for row in rows:
        print(f"{row['impl']:>6} {row['r']:>3} {row['error']:>9.5f} {100 * row['agreement']:>8.1f}")
    print(json.dumps({"model": args.model, "dtype": args.dtype, "device": args.device, "rows": rows}))


@torch.inference_mode()
def measure(model: Any, images: Tensor, ladder: list[int], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """timm's own model first, then ours at each r, and ours in float8 if possible."""
    wide = copy.deepcopy(model).to(images.device)
    narrow = copy.deepcopy(wide).to(dtype)
    ours, exact = tome_core.wrap(narrow, "fused"), tome_core.wrap(wide, "plain")
    some = images[:IN_FLOAT64].to(dtype)
    in_float64 = tome_core.wrap(copy.deepcopy(narrow).double().cpu(), "fused")  # the weights after rounding
    models: dict[str, Any] = {"timm": lambda x, _: narrow(x), "ours": ours}
    try:
        models["float8"] = ours.in_float8()
    except tome_core.UnsupportedModelError:  # for the model or in this dtype
        pass
    right = {r: _answers(lambda x, r=r: exact(x, r), images) for r in {0, *ladder}}
    for impl, r in [("timm", 0), *((impl, r) for impl in list(models)[1:] for r in ladder)]:
        answers = _answers(lambda x, impl=impl, r=r: models[impl](x, r), images.to(dtype))
        with recorded() as plans:
            got = models[impl](some, r)
        with replayed(plans), mock.patch("tome_core.vit.DTYPES", (torch.float64,)):
            wanted = in_float64(some.double().cpu(), r)
        error = (got.double().cpu() - wanted).norm() / wanted.norm()
        same = answers == right[r]
        yield {"impl": impl, "r": r, "error": error.item(), "agreement": same.float().mean().item()}


def _answers(classify: Any, images: Tensor) -> Tensor:
    return torch.cat([classify(batch).argmax(dim=1).cpu() for batch in images.split(50)])


if __name__ == "__main__":
    main()
