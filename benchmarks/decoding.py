"""Decoding: photos a second by Pillow on all cores and by the engine on its device, and whether answers stay the same.

python -m benchmarks.decoding --photos FOLDER --model NAME --weights FILE --device cuda --batch 32,128

Of the JPEGs that the engine takes as they come; the others are counted. Pillow decodes and resizes as an HTTP process
does. The device decodes alone, and then decodes, resizes and normalises, as the engine's first stage does. CPU ms are
those of all threads for one photo. Agreement is of the likeliest class at r=0. The last line is JSON: {"rows":
[{"path", "batch", "images_per_s", "cpu_ms"}], "photos", "left_to_pillow", "agreement"}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from server.device.models import LoadedModel, load_model
from server.device.preparing import Preparer
from server.device.runner import Prepared, Runner
from server.device.torch_backend import set_threads
from server.errors import ServerError
from server.images.nvjpeg import decode_jpegs, engine_decodes
from server.images.photos import choose_photos
from server.images.pillow import decode, decode_for
from server.settings import ModelSpec, SettingsError
from server.types import Job

MAX_PIXELS = 89_000_000
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos")
    parser.add_argument("--limit", type=int, default=1000, help="the most photos to use")
    parser.add_argument("--model", default="bundled", help="as for tome-server serve")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--batch", default="32,128", help="files that are decoded together")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    set_threads(args.threads)
    spec = ModelSpec.model_validate({"source": args.model, "weights": args.weights})
    loaded = load_model(spec)
    runner = Runner({spec.name: loaded}, args.device, args.precision)
    try:
        engine_decodes("device", runner.device)
    except SettingsError as error:
        parser.error(str(error))
    files = [file.read_bytes() for file in choose_photos(args.photos, args.limit, seed=0)]
    jobs = list(taken(loaded, files))
    if not jobs:
        parser.error(f"the engine takes none of the {len(files)} photos as they come: {args.photos}")
    mean_kb, others = sum(len(job.pixels) for job in jobs) / len(jobs) / 1e3, len(files) - len(jobs)
    print(f"{len(jobs)} photos of {mean_kb:.0f} kB on average, on {runner.device}; {others} are left to Pillow")
    print(f"{'':<26} {'batch':>6} {'images/s':>9} {'CPU ms':>7}")
    rows = []
    for row in measure(loaded, runner, jobs, [int(size) for size in args.batch.split(",")]):
        rows.append(row)
        print(
            f"{row['path']:<26} {row['batch'] or '':>6} {row['images_per_s']:>9.0f} {row['cpu_ms']:>7.2f}", flush=True
        )
    same = agreement(loaded, runner, jobs)
    print(f"top-1 agreement at r=0: {100 * same:.1f} % (goal: 99 %)")
    told = {"photos": len(jobs), "left_to_pillow": others, "agreement": same}
    print(json.dumps({"model": args.model, "device": str(runner.device), "rows": rows, **told}))


def taken(loaded: LoadedModel, files: Sequence[bytes]) -> Iterator[Job]:
    """The files that an engine which decodes gets as they came."""
    info = replace(loaded.info, decodes_jpeg=True)
    for file in files:
        pixels, jpeg_pixels = decode_for(info, file, MAX_PIXELS)
        if jpeg_pixels:
            yield Job(info.name, pixels, info.schedule(0), 1, 0.0, jpeg_pixels)


def measure(
    loaded: LoadedModel, runner: Runner, jobs: Sequence[Job], batches: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each path and batch size."""
    info, device = loaded.info, runner.device
    prepare = Preparer(runner, {info.name: info}, MAX_PIXELS)
    key = info.batch_key(info.schedule(0))

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def by_pillow() -> None:
            list(pool.map(lambda job: decode(job.pixels, info.preprocessing, MAX_PIXELS), jobs))

        yield {"path": "Pillow, all cores", "batch": None, **_speed(by_pillow, len(jobs))}
    for size in batches:
        parts = [jobs[start : start + size] for start in range(0, len(jobs), size)]

        def by_device(parts: Sequence[Sequence[Job]] = parts) -> None:
            for part in parts:
                decode_jpegs([job.pixels for job in part], device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

        def all_of_it(parts: Sequence[Sequence[Job]] = parts) -> None:
            for part in parts:
                prepare(key, part)

        yield {"path": "device, decoded", "batch": size, **_speed(by_device, len(jobs))}
        yield {"path": "device, decoded and resized", "batch": size, **_speed(all_of_it, len(jobs))}


def _speed(work: Callable[[], None], images: int) -> dict[str, float]:
    """Medians over rounds, the first apart."""
    work()
    seconds, of_cpu = [], []
    for _ in range(ROUNDS):
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - start)
        of_cpu.append(time.process_time() - start_cpu)
    return {"images_per_s": images / statistics.median(seconds), "cpu_ms": 1e3 * statistics.median(of_cpu) / images}


def agreement(loaded: LoadedModel, runner: Runner, jobs: Sequence[Job], size: int = 32) -> float:
    """Share of photos whose likeliest class at r=0 is the same, decoded by Pillow and by the device."""
    info = loaded.info
    prepare = Preparer(runner, {info.name: info}, MAX_PIXELS)
    key = info.batch_key(info.schedule(0))
    same = 0
    for start in range(0, len(jobs), size):
        part = jobs[start : start + size]
        pixels = [decode(job.pixels, info.preprocessing, MAX_PIXELS) for job in part]
        by_pillow = runner.run_batch(key, [replace(job, pixels=each) for job, each in zip(part, pixels, strict=True)])
        by_device = runner.run_prepared(key, [_ready(each) for each in prepare(key, part)])
        same += sum(one.indices == other.indices for one, other in zip(by_pillow, by_device, strict=True))
    return same / len(jobs)


def _ready(outcome: Prepared | ServerError) -> Prepared:
    if isinstance(outcome, ServerError):
        raise outcome
    return outcome


if __name__ == "__main__":
    main()
