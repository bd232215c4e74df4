"""The bare forward loop: full batches, one after the other, as in an engine, without a server.

python -m benchmarks.forward_loop --model vit_base_patch16_224 --weights random --device cuda --precision bf16 --r 0 13

It is the upper bound of a server with this model; benchmarks.serving starts it as a separate process. Images are noise,
because their content does not affect the time. The last line is JSON: {"model", "batch", "images_per_s": {r:
images/s}}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from itertools import pairwise

from server.device.backend import BackendOptions
from server.device.models import load_model
from server.device.outcome import Wanted
from server.device.prepared import stacked
from server.device.runner import Runner
from server.device.torch_backend import set_threads
from server.model_spec import ModelSpec
from server.types import BatchKey

WARM_UP_ROUNDS, LEAST_ROUNDS = 2, 6
WANTED = Wanted(("softmax",), top_k=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled", help="as for tome-server serve")
    parser.add_argument("--weights", help="safetensors file for a timm name, or random")
    parser.add_argument("--r", type=int, nargs="+", default=[0, 13], metavar="R")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--duration", type=float, default=3, help="seconds of each r")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="as for tome-server serve")
    parser.add_argument("--backend", default="auto", help="as for tome-server serve")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    set_threads(args.threads)
    spec = ModelSpec.model_validate({"source": args.model, "weights": args.weights})
    loaded = load_model(spec)
    options = BackendOptions(args.backend, args.threads, None, args.batch)
    runner = Runner({spec.name: loaded}, args.device, args.precision, options)
    measured = {}
    for r in args.r:
        measured[r] = images_per_s(runner, loaded.info.batch_key(loaded.info.schedule(r)), args)
        print(f"bare forward loop, {args.model}, r={r}, batch {args.batch}: {measured[r]:,.1f} images/s", flush=True)
    print(json.dumps({"model": args.model, "batch": args.batch, "images_per_s": measured}))


def images_per_s(runner: Runner, key: BatchKey, args: argparse.Namespace) -> float:
    """Images/s of one schedule, with pixels on the device; a batch is launched before the result of the last one."""
    images = [os.urandom(math.prod(key.input_size) * 3) for _ in range(args.batch)]
    pixels = stacked(images, key.input_size, runner.device)
    runner.warm_up(key)
    for _ in range(WARM_UP_ROUNDS):
        runner.launch(key, pixels, WANTED).result()
    ends = time.perf_counter() + args.duration
    launched = runner.launch(key, pixels, WANTED)
    moments: list[float] = []
    while len(moments) < LEAST_ROUNDS or time.perf_counter() < ends:
        following = runner.launch(key, pixels, WANTED)
        launched.result()
        launched = following
        moments.append(time.perf_counter())
    launched.result()
    seconds = statistics.median(after - before for before, after in pairwise(moments))
    return float(args.batch / seconds)


if __name__ == "__main__":
    main()
