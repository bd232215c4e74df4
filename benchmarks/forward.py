"""Speed of the forward pass: ours at each `r` beside timm, compiled timm, and the paper's maths in plain PyTorch.

python -m benchmarks.forward --model vit_base_patch16_224 --batch 256 --r 0 4 8 11 13 16 --device cuda --dtype bf16
python -m benchmarks.forward --model vit_base_patch16_224 --batch 1,8,32 --r 0 13 --device cuda --dtype bf16 --replay

python -m benchmarks.forward --model vit_tiny_patch16_224 --batch 1,8,32 --r 0 13 16 --device cpu --dtype bf16 \\
    --impl timm,ours,timm-openvino,openvino

All of them run in turn on the same random images, with random weights. Names that begin with "timm" are timm's own
model. "unfused" merges by the paper's maths in plain PyTorch, "plain" and "ours" by tome_core without and with its
kernels, "ours-pixels" is "ours" from uint8 pixels, "ours-fp8" in float8. Names that end with "-recorded" are replayed
by `tome_core.Recorded`, including its copies. "openvino" and "onnxruntime" are our model in those runtimes. "speed-up"
is over r=0 of the same implementation; "ideal" is the speed-up of the saved arithmetic. `--replay` runs each as a
recorded CUDA graph, without its launches; `--profile` shows the time of each kernel (for OpenVINO by one thread). The
last line is JSON: {"rows": [{"impl", "r", "batch", "images_per_s", "ms", "speedup", "flop_ideal", "tflops"}], ...}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tome_core
from benchmarks.unfused import Unfused
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions
from tome_core.recorded import CudaRecorder
from tome_core.schedule import resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3
Forward = Callable[[Tensor], Any]


class Contender(NamedTuple):
    """A timed combination: a name, an `r`, a forward pass, and its images."""

    impl: str
    r: int
    forward: Forward
    images: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--batch", default="256", help="batch sizes")
    parser.add_argument("--r", type=int, nargs="+", default=[0, 4, 8, 11, 13, 16], metavar="R", help="values of r")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--impl", default="timm,timm-compiled,unfused,ours", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each")
    parser.add_argument("--replay", action="store_true", help="as recorded CUDA graphs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table into this file")
    parser.add_argument(
        "--profile", action="store_true", help="time of each kernel, for ours and openvino (there by one thread)"
    )
    args = parser.parse_args()

    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model = timm.create_model(args.model).to(device, dtype).eval()
    ladder, rows = args.r, []
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    how = "replayed" if args.replay else "launched"
    print(f"{args.model}, {args.dtype}, {how}, {machine}, torch {torch.__version__}")
    print(f"{'batch':>5} {'':>17} {'r':>3} {'ms':>9} {'images/s':>9} {'speed-up':>9} {'ideal':>7} {'TFLOP/s':>8}")
    for batch in map(int, args.batch.split(",")):
        images = torch.randn(batch, *resolve_model_data_config(model)["input_size"], device=device, dtype=dtype)
        entered = list(contenders(model, args.impl.split(","), ladder, images))
        for row in measure(model, entered, args.runs, args.replay):
            rows.append(row)
            print(
                f"{batch:>5} {row['impl']:>17} {row['r']:>3} {row['ms']:>9.3f} {row['images_per_s']:>9.1f} "
                f"{row['speedup']:>8.2f}x {row['flop_ideal']:>6.2f}x {row['tflops']:>8.2f}",
                flush=True,
            )
        if args.profile:
            for contender in entered:
                if contender.impl.startswith("ours"):
                    profile(contender)
                if contender.impl == "openvino":
                    from benchmarks.runtimes import profile_openvino

                    profile_openvino(model, contender.r, images)
    if args.plot:
        from benchmarks.plot import draw_forward

        draw_forward(rows, args.plot)
    print(
        json.dumps({"model": args.model, "dtype": args.dtype, "device": machine, "replay": args.replay, "rows": rows})
    )


def contenders(model: Any, names: Sequence[str], ladder: Sequence[int], images: Tensor) -> Iterator[Contender]:
    """One for each name and `r`; those without merging only at r=0."""
    for name in names:
        if name not in NAMES:
            raise SystemExit(f"--impl names {name!r}; it must be of {', '.join(NAMES)}")
        for r in [0] if name.startswith("timm") else dict.fromkeys([0, *ladder]):
            if name in IMPLEMENTATIONS:
                shown = pixels_like(images) if name == "ours-pixels" else images
                yield Contender(name, r, IMPLEMENTATIONS[name](model, r), shown)
            else:
                from benchmarks.runtimes import RUNNERS  # their packages are not on every machine

                yield Contender(name, r, RUNNERS[name](model, r, images), images.float())


def pixels_like(images: Tensor) -> Tensor:
    """Random pixels, (B, H, W, 3) in uint8, of the same number and size of images."""
    B, channels, H, W = images.shape
    return torch.randint(0, 256, (B, H, W, channels), dtype=torch.uint8, device=images.device)


def _timm(model: Any, r: int) -> Forward:
    return lambda images: model(images)


def _timm_compiled(model: Any, r: int) -> Forward:
    return torch.compile(model)


def _unfused(model: Any, r: int) -> Forward:
    merged = Unfused(model)
    return lambda images: merged.forward_head(merged.forward_tokens(images, r))  # all of the last block, as published


def _ours(model: Any, r: int) -> Forward:
    return tome_core.FixedR(tome_core.wrap(model), r)


def _ours_recorded(model: Any, r: int) -> Forward:
    return tome_core.Recorded(tome_core.wrap(model), r)


def _ours_fp8(model: Any, r: int) -> Forward:
    return tome_core.FixedR(tome_core.wrap(model).in_float8(), r)


def _ours_fp8_recorded(model: Any, r: int) -> Forward:
    return tome_core.Recorded(tome_core.wrap(model).in_float8(), r)


def _ours_pixels(model: Any, r: int) -> Forward:
    config = resolve_model_data_config(model)
    return tome_core.FixedR(tome_core.wrap(model).from_pixels(config["mean"], config["std"]), r)


def _plain(model: Any, r: int) -> Forward:
    return tome_core.FixedR(tome_core.wrap(model, "plain"), r)


IMPLEMENTATIONS: dict[str, Callable[[Any, int], Forward]] = {
    "timm": _timm,
    "timm-compiled": _timm_compiled,
    "unfused": _unfused,
    "plain": _plain,
    "ours": _ours,
    "ours-recorded": _ours_recorded,
    "ours-pixels": _ours_pixels,
    "ours-fp8": _ours_fp8,
    "ours-fp8-recorded": _ours_fp8_recorded,
}
NAMES = (*IMPLEMENTATIONS, "timm-openvino", "openvino", "timm-onnxruntime", "onnxruntime")


@torch.inference_mode()
def measure(model: nn.Module, entered: Sequence[Contender], runs: int, replay: bool) -> Iterator[dict[str, Any]]:
    """One row each. They run in turn, so that a disturbance, or a warm chip, affects all alike."""
    calls: list[Callable[[], object]] = [partial(contender.forward, contender.images) for contender in entered]
    if replay:
        record = CudaRecorder()
        calls = [record(partial(contender.forward, contender.images)).replay for contender in entered]
    took_s: list[list[float]] = [[] for _ in calls]
    for run in range(-WARM_UP, runs):
        for call, times in zip(calls, took_s, strict=True):
            seconds = timed(call, entered[0].images.device)
            if run >= 0:
                times.append(seconds)
    medians = {(c.impl, c.r): statistics.median(times) for c, times in zip(entered, took_s, strict=True)}
    for contender in entered:
        seconds = medians[contender.impl, contender.r]
        cost = work(model, contender)
        yield {
            "impl": contender.impl,
            "r": contender.r,
            "batch": len(contender.images),
            "images_per_s": len(contender.images) / seconds,
            "ms": 1000 * seconds,
            "speedup": medians[contender.impl, 0] / seconds,
            "flop_ideal": work(model, contender._replace(r=0)) / cost,
            "tflops": len(contender.images) * cost / seconds / 1e12,
        }


def work(model: nn.Module, contender: Contender) -> int:
    """Floating-point operations for an image; only ours leaves out what the head does not read."""
    merged = tome_core.wrap(model)
    try:
        sizes = dimensions(merged)
    except tome_core.UnsupportedModelError:  # attention pooling and the like: count what runs
        with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
            merged.plain()(torch.zeros_like(contender.images[:1]), contender.r)
        return int(counter.get_total_flops())
    if contender.impl == "unfused" or contender.impl.startswith("timm"):
        sizes = replace(sizes, prefix_only_last=False)
    return flops(sizes, resolve(contender.r, merged.num_blocks))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, on a GPU by its own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


@torch.inference_mode()
def profile(contender: Contender, runs: int = 5) -> None:
    """Prints the share of each kernel, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if contender.images.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(runs):
            contender.forward(contender.images)
    on_gpu = contender.images.device.type == "cuda"
    events = [e for e in profiler.key_averages() if not on_gpu or e.device_type.name == "CUDA"]
    took = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count) for e in events}
    total = sum(us for us, _ in took.values())
    print(f"{contender.impl}, r={contender.r}: {total / runs / 1000:.3f} ms")
    for name, (us, count) in sorted(took.items(), key=lambda item: -item[1][0])[:14]:
        print(f"  {us / total:>6.1%} {us / runs / 1000:>9.3f} ms {count // runs:>4} x  {name[:80]}")


if __name__ == "__main__":
    main()
