"""The rate of `tome-server run` on a folder, beside its bounds: the forward loop and decoding alone.

python -m benchmarks.folders --images FOLDER --model vit_tiny_patch16_224 --weights FILE --r 0 13 --limit 1000

It computes a folder of `--images` links to the photos. `forward` is the loop of full batches with prepared pixels
(benchmarks.forward_loop). `reading` is all work of threads or processes on the files before the device, which on a CPU
includes decoding. `decoding` is the device's work on JPEG files in memory, if it decodes. `run` is the rate that the
command itself reports. All four run in each round, in this process; the table has medians.

`bound` is the limit that they set: on a GPU the least of them, because they use different parts of the machine; on a
CPU, where they share the cores, the rate of one after the other. The last line is JSON: {"model", "images", "rows":
[{"r", "forward", "reading", "decoding", "run", "bound", "of_bound", "of_forward"}]}.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from benchmarks.forward_loop import images_per_s
from server.cli import main as tome_server
from server.cpus import available_cpus
from server.device.backend import BackendOptions
from server.device.models import load_model
from server.device.preparing import Preparer
from server.device.runner import Runner
from server.device.torch_backend import set_threads
from server.errors import ServerError
from server.images.image import Image
from server.images.nvjpeg import engine_decodes
from server.images.photos import photos_in
from server.ipc.messages import Classify, Item
from server.model_spec import ModelSpec
from server.offline.computing import MOST_UNDER_WAY, open_readers
from server.offline.reader_processes import FILES_OF_A_PROCESS
from server.types import BatchKey, ModelInfo

MAX_PIXELS = 50_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument("--limit", type=int, default=1000, help="files to compute: links to the photos, in turn")
    parser.add_argument("--model", default="bundled", help="as for tome-server serve")
    parser.add_argument("--weights", help="safetensors file for a timm name, or random")
    parser.add_argument("--r", type=int, nargs="+", default=[0, 13], metavar="R")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--duration", type=float, default=3, help="seconds of a forward loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="as for tome-server serve")
    parser.add_argument("--backend", default="auto", help="as for tome-server serve")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--decode", default="auto", help="as for tome-server serve")
    parser.add_argument("--suffix", default=".jsonl", help="of the table")
    parser.add_argument("--embed", action="store_true", help="write vectors")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        files = linked(photos_in(args.images), args.limit, Path(folder) / "photos")
        rows = measure(args, files, Path(folder))
    print(json.dumps({"model": args.model, "images": args.limit, "batch": args.batch, "rows": rows}))


def linked(photos: Sequence[Path], count: int, folder: Path) -> list[str]:
    """Makes `count` links to the photos."""
    folder.mkdir()
    files = [folder / f"{index:07}{photo.suffix}" for index, photo in zip(range(count), itertools.cycle(photos))]
    for file, photo in zip(files, itertools.cycle(photos), strict=False):
        file.symlink_to(photo.resolve())
    return [str(file) for file in files]


def measure(args: argparse.Namespace, files: Sequence[str], folder: Path) -> list[dict[str, float]]:
    """A row for each `r`, printed when it is measured."""
    set_threads(args.threads)
    spec = ModelSpec.model_validate({"source": args.model, "weights": args.weights})
    loaded = load_model(spec)
    runner = Runner(
        {spec.name: loaded},
        args.device,
        args.precision,
        BackendOptions(args.backend, args.threads, None, args.batch),
    )
    info = replace(loaded.info, decodes_jpeg=engine_decodes(args.decode, runner.device))
    preparer = Preparer(runner.device, {info.name: info}, MAX_PIXELS) if info.decodes_jpeg else None
    is_shared = runner.device.type == "cpu"
    names = ("forward", "reading", "decoding", "run", "bound", "of bound", "of forward")
    print(f"{'r':>4} " + " ".join(f"{name:>10}" for name in names))
    rows = []
    for r in args.r:
        key = info.batch_key(info.schedule(r))
        rounds: list[tuple[float, ...]] = []
        for _ in range(args.rounds):
            reading, images = read(info, files, args.batch)
            decoding = decoded(preparer, key, images, args.batch) if preparer else 0.0
            rounds.append((images_per_s(runner, key, args), reading, decoding, run(args, r, folder)))
        forward, reading, decoding, computed = map(statistics.median, zip(*rounds, strict=True))
        parts = [rate for rate in (forward, reading, decoding) if rate]
        bound = 1 / sum(1 / rate for rate in parts) if is_shared else min(parts)
        row = {"forward": forward, "reading": reading, "decoding": decoding, "run": computed, "bound": bound}
        rows.append({"r": r, **row, "of_bound": computed / bound, "of_forward": computed / forward})
        told = " ".join(f"{value:>10,.1f}" for value in row.values())
        print(f"{r:>4} {told} {computed / bound:>10.2f} {computed / forward:>10.2f}", flush=True)
    return rows


def read(info: ModelInfo, files: Sequence[str], size: int) -> tuple[float, list[Image | str]]:
    """Files a second by the threads or processes of the command, and the images."""
    with contextlib.closing(open_readers(info, MAX_PIXELS)) as readers:
        for part in readers.read([files[0]] * FILES_OF_A_PROCESS * available_cpus()):  # until all have started
            part.result()
        images: list[Image | str] = []
        under_way: deque[list[Future[list[Image | str]]]] = deque()
        start = time.perf_counter()
        for batch in (files[at : at + size] for at in range(0, len(files), size)):
            under_way.append(readers.read(batch))
            if len(under_way) == MOST_UNDER_WAY:
                images += _images(under_way.popleft())
        while under_way:
            images += _images(under_way.popleft())
        return len(files) / (time.perf_counter() - start), images


def _images(read: Sequence[Future[list[Image | str]]]) -> list[Image | str]:
    return [image for part in read for image in part.result()]


def decoded(preparer: Preparer, key: BatchKey, images: Sequence[Image | str], size: int) -> float:
    """Images a second that the device decodes, batch by batch."""
    began = time.perf_counter()
    for start in range(0, len(images), size):
        batch = [image for image in images[start : start + size] if not isinstance(image, str)]
        request = Classify(model=key.model, images=batch, deadline=0.0, top_k=1)
        for each in preparer(key, [Item(request, index) for index in range(len(batch))]):
            if isinstance(each, ServerError):
                raise each
    return len(images) / (time.perf_counter() - began)


def run(args: argparse.Namespace, r: int, folder: Path) -> float:
    """Images a second as the command reports them, without loading the model."""
    command = ["run", str(folder / "photos"), "-o", str(folder / f"table{args.suffix}"), "--overwrite", "--r", str(r)]
    for flag in ("model", "weights", "device", "precision", "backend", "decode", "threads"):
        if getattr(args, flag) is not None:
            command += [f"--{flag}", str(getattr(args, flag))]
    command += ["--max-batch-size", str(args.batch), "--state-dir", "none", *(["--embed"] if args.embed else [])]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
        status = tome_server(command)
    if status:
        raise SystemExit(f"tome-server run ended with status {status}")
    return float(json.loads(told.getvalue().splitlines()[-1])["images_per_s"])


if __name__ == "__main__":
    main()
