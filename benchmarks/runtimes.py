"""timm's model and ours in the usual runtimes for CPUs, with torch's number of threads."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tome_core
from server.device.openvino_compiler import Compiler
from server.device.openvino_graphs import BATCH_SIZES, any_batch, config_of, run_of
from tome_core.openvino_core import core
from tome_core.quiet import onnxruntime, openvino

Run = Callable[[Tensor], object]
WARM_UP = 5


def openvino_ours(model: Any, r: int, images: Tensor) -> Run:
    """The merging model as in the server."""
    merged = tome_core.wrap(_float32(model))
    compiler = Compiler(merged, _size(images), torch.get_num_threads())
    return compiler.any_batch((r,) * merged.num_blocks, len(images), _precision(images))


def openvino_timm(model: Any, r: int, images: Tensor) -> Run:
    """timm's own model, converted by OpenVINO; large batches run in parts, side by side, like ours."""
    threads = torch.get_num_threads()
    converted = openvino.convert_model(_float32(model), example_input=images[:1].float())

    def graph(size: int, side_by_side: int) -> Callable[[Tensor], Tensor]:
        converted.reshape([size, *images.shape[1:]])
        config = config_of(_precision(images), threads, side_by_side)
        return run_of(core().compile_model(converted, "CPU", config), size, side_by_side)

    return any_batch(graph, threads, len(images), BATCH_SIZES[_precision(images)])


def onnxruntime_ours(model: Any, r: int, images: Tensor) -> Run:
    """The merging model, exported by `tome_core.export_onnx`."""
    with tempfile.TemporaryDirectory() as folder:
        written = tome_core.export_onnx(tome_core.wrap(_float32(model)), r, _size(images), Path(folder) / "model.onnx")
        return _session(written.path, images)


def onnxruntime_timm(model: Any, r: int, images: Tensor) -> Run:
    """timm's own model, exported by torch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(_float32(model), (images.float(),), path, dynamo=True, input_names=["images"])
        return _session(path, images)


def profile_openvino(model: Any, r: int, images: Tensor, runs: int = 30) -> None:
    """Prints OpenVINO's own time of each kind of operation, by one thread: medians, summed over the graph."""
    merged = tome_core.wrap(_float32(model))
    precision = _precision(images)
    config = config_of(precision, 1, 1) | {"PERF_COUNT": True}
    compiled = Compiler(merged, _size(images), 1).compiled((r,) * merged.num_blocks, len(images), precision, config)
    request = compiled.create_infer_request()
    took: dict[tuple[str, str, str], list[float]] = {}
    for run in range(-WARM_UP, runs):
        request.infer({0: images.float().numpy()})
        for each in request.profiling_info:
            if run >= 0:
                name = (each.node_type, each.exec_type, each.node_name)
                took.setdefault(name, []).append(1000 * each.real_time.total_seconds())
    kinds: dict[tuple[str, str], list[float]] = {}
    for (kind, how, _), times in took.items():
        if max(times):
            kinds.setdefault((kind, how), []).append(statistics.median(times))
    total = sum(map(sum, kinds.values()))
    print(f"r={r}: {total:.3f} ms")
    for (kind, how), times in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        print(f"  {sum(times) / total:>6.1%} {sum(times):>9.3f} ms {len(times):>4} x  {kind} ({how})")


RUNNERS = {
    "timm-openvino": openvino_timm,
    "openvino": openvino_ours,
    "timm-onnxruntime": onnxruntime_timm,
    "onnxruntime": onnxruntime_ours,
}


def _session(path: Path, images: Tensor) -> Run:
    if images.dtype != torch.float32:
        raise SystemExit("onnxruntime computes in fp32 on the CPU; use --dtype fp32 with it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": batch.numpy()})


def _precision(images: Tensor) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[images.dtype]


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def _float32(model: Any) -> Any:
    """Runtimes take float32 models, and compute in their configured precision."""
    return copy.deepcopy(model).float()
