"""Photos decoded a second by Pillow on all cores and by the engine on its device, and whether answers stay the same.

python -m benchmarks.decoding --images FOLDER --model NAME --weights FILE --device cuda --batch 32,128

It measures the JPEGs that the engine decodes; the others are counted. Pillow decodes and resizes as in an HTTP process.
The device first only decodes, by torchvision, for comparison; then it decodes, resizes and crops, like the engine's
first stage. CPU ms are those of all threads for one photo. Agreement is of the likeliest class at r=0; "same" is the
share of photos whose pixels are all equal. The last line is JSON: {"rows": [{"path", "batch", "images_per_s",
"cpu_ms"}], "photos", "left_to_pillow", "agreement", "same"}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from server.cpus import available_cpus
from server.device.models import LoadedModel, load_model
from server.device.prepared import PixelBatch, Prepared, rows, stacked
from server.device.preparing import Preparer
from server.device.runner import Runner
from server.device.torch_backend import set_threads
from server.errors import ServerError, SettingsError
from server.images.image import JpegFile
from server.images.nvjpeg import engine_decodes
from server.images.photos import choose_photos
from server.images.pillow import decode, read
from server.ipc.messages import Classify, Item, TopK
from server.model_spec import ModelSpec
from server.types import BatchKey

MAX_PIXELS = 89_000_000
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
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
    files = [file.read_bytes() for file in choose_photos(args.images, args.limit, seed=0)]
    items = list(taken(loaded, files))
    if not items:
        parser.error(f"the engine decodes none of the {len(files)} photos: {args.images}")
    mean_kb, others = sum(len(item.image.data) for item in items) / len(items) / 1e3, len(files) - len(items)
    print(f"{len(items)} photos of {mean_kb:.0f} kB on average, on {runner.device}; {others} are left to Pillow")
    print(f"{'':<26} {'batch':>6} {'images/s':>9} {'CPU ms':>7}")
    measured = []
    for row in measure(loaded, runner.device, items, [int(size) for size in args.batch.split(",")]):
        measured.append(row)
        print(
            f"{row['path']:<26} {row['batch'] or '':>6} {row['images_per_s']:>9.0f} {row['cpu_ms']:>7.2f}", flush=True
        )
    agreed, same = agreement(loaded, runner, items)
    print(f"top-1 agreement at r=0: {100 * agreed:.1f} % (goal: 99 %); the same pixels: {100 * same:.1f} %")
    told = {"photos": len(items), "left_to_pillow": others, "agreement": agreed, "same": same}
    print(json.dumps({"model": args.model, "device": str(runner.device), "rows": measured, **told}))


def taken(loaded: LoadedModel, files: Sequence[bytes]) -> Iterator[Item]:
    """The files that an engine with a decoder gets."""
    info = loaded.info
    for file in files:
        image = read(file, info.preprocessing, MAX_PIXELS, decodes_jpeg=True)
        if isinstance(image, JpegFile):
            yield Item(Classify(model=info.name, images=[image], deadline=0.0, top_k=1), 0)


def measure(
    loaded: LoadedModel, device: torch.device, items: Sequence[Item], batches: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each path and batch size."""
    from torchvision.io import ImageReadMode, decode_jpeg

    info = loaded.info
    prepare = Preparer(device, {info.name: info}, MAX_PIXELS)
    key = info.batch_key(info.schedule(0))

    with ThreadPoolExecutor(available_cpus()) as pool:

        def by_pillow() -> None:
            list(pool.map(lambda item: decode(item.image.data, info.preprocessing, MAX_PIXELS), items))

        yield {"path": "Pillow, all cores", "batch": None, **_speed(by_pillow, len(items))}
    for size in batches:
        parts = [items[start : start + size] for start in range(0, len(items), size)]

        def by_torchvision(parts: Sequence[Sequence[Item]] = parts) -> None:
            for part in parts:
                files = [torch.frombuffer(bytearray(item.image.data), dtype=torch.uint8) for item in part]
                decode_jpeg(files, ImageReadMode.RGB, device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

        def all_of_it(parts: Sequence[Sequence[Item]] = parts) -> None:
            for part in parts:
                prepare(key, part)

        yield {"path": "device, decoded", "batch": size, **_speed(by_torchvision, len(items))}
        yield {"path": "device, decoded and resized", "batch": size, **_speed(all_of_it, len(items))}


def _speed(work: Callable[[], None], images: int) -> dict[str, float]:
    """Medians over rounds, without the first."""
    work()
    seconds, of_cpu = [], []
    for _ in range(ROUNDS):
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - start)
        of_cpu.append(time.process_time() - start_cpu)
    return {"images_per_s": images / statistics.median(seconds), "cpu_ms": 1e3 * statistics.median(of_cpu) / images}


def agreement(loaded: LoadedModel, runner: Runner, items: Sequence[Item], size: int = 32) -> tuple[float, float]:
    """Shares of photos whose likeliest class at r=0, and whose pixels, are the same by Pillow and by the device."""
    info = loaded.info
    prepare = Preparer(runner.device, {info.name: info}, MAX_PIXELS)
    key = info.batch_key(info.schedule(0))
    agreed = same = 0
    for start in range(0, len(items), size):
        part = items[start : start + size]
        pixels = [decode(item.image.data, info.preprocessing, MAX_PIXELS) for item in part]
        batch = PixelBatch(stacked(pixels, key.input_size, runner.device))
        by_pillow = [Prepared(item, batch, row) for row, item in enumerate(part)]
        by_device = [_ready(each) for each in prepare(key, part)]
        answers = zip(_likeliest(runner, key, by_pillow), _likeliest(runner, key, by_device), strict=True)
        agreed += sum(one == other for one, other in answers)
        same += int((rows(by_device) == batch.pixels).flatten(1).all(1).sum())
    return agreed / len(items), same / len(items)


def _likeliest(runner: Runner, key: BatchKey, prepared: Sequence[Prepared]) -> list[list[int]]:
    """The classes of each image."""
    return [answer.indices for answer in runner.forward(key, prepared) if isinstance(answer, TopK)]


def _ready(outcome: Prepared | ServerError) -> Prepared:
    if isinstance(outcome, ServerError):
        raise outcome
    return outcome


if __name__ == "__main__":
    main()
