"""Descriptions of the server and its models in the Open Inference Protocol: plain dicts, the same for REST and gRPC."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.samples import Sample

from server import __version__
from server.api.protocols.oip_infer import outputs_of
from server.api.protocols.oip_tensors import INPUT
from server.metrics import samples
from server.types import ModelInfo

EXTENSIONS = (
    "classification",
    "model_configuration",
    "statistics",
    "binary_tensor_data",
    "parameters",
    "model_repository",
)
"""Their names in NVIDIA Triton."""

NAME = "tome-server"
PLATFORM = "timm"


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of this server."""
    return {"name": NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def metadata(info: ModelInfo) -> dict[str, Any]:
    """Inputs and outputs of a model. -1 stands for any number of images."""
    return {
        "name": info.name,
        "versions": [info.version],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, size]} for name, size in outputs_of(info).items()],
    }


def config(info: ModelInfo, max_images: int) -> dict[str, Any]:
    """A model's configuration in the form of Triton's ModelConfig, with the shapes of one image.

    Its parameters describe pixels: input size (height, width), mean and standard deviation.
    """
    seen = info.preprocessing
    return {
        "name": info.name,
        "platform": PLATFORM,
        "backend": info.backend.name if info.backend else "",
        "max_batch_size": max_images,
        "input": [{"name": INPUT, "data_type": "TYPE_STRING", "dims": [1]}],
        "output": [{"name": name, "data_type": "TYPE_FP32", "dims": [size]} for name, size in outputs_of(info).items()],
        "dynamic_batching": {},
        "parameters": {
            name: {"string_value": ",".join(map(str, values))}
            for name, values in (("input_size", seen.input_size), ("mean", seen.mean), ("std", seen.std))
        },
    }


def statistics(models: Iterable[ModelInfo]) -> list[dict[str, Any]]:
    """Statistics of models since the server started, over all processes and protocols.

    It reads the metrics of all processes, which takes milliseconds.
    """
    wanted = {info.name: info for info in models}
    found: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in wanted}
    for sample in samples():
        if sample.labels.get("model") in wanted:
            found[sample.labels["model"]][_name(sample)] += sample.value
    return [_statistics(info, found[name]) for name, info in wanted.items()]


def _name(sample: Sample) -> str:
    """The name of a sample, with the success of the request."""
    return sample.name + {None: "", "200": " ok"}.get(sample.labels.get("code"), " failed")


def _statistics(info: ModelInfo, sums: Mapping[str, float]) -> dict[str, Any]:
    """Statistics of one model, from the sums of its samples. Durations that are not measured by model are zero."""

    def duration(count: str, seconds: str = "") -> dict[str, int]:
        return {"count": round(sums.get(count, 0)), "ns": round(1e9 * sums.get(seconds, 0))}

    batches, images = "tome_batch_size_count", "tome_batch_size_sum"
    return {
        "name": info.name,
        "version": info.version,
        "inference_count": round(sums.get(images, 0)),
        "execution_count": round(sums.get(batches, 0)),
        "inference_stats": {
            "success": duration("tome_requests_total ok", "tome_request_duration_seconds_sum"),
            "fail": duration("tome_requests_total failed"),
            "queue": duration("tome_queue_duration_seconds_count", "tome_queue_duration_seconds_sum"),
            "compute_input": duration(batches),
            "compute_infer": duration(batches, "tome_inference_duration_seconds_sum"),
            "compute_output": duration(batches),
            "cache_hit": duration(""),
            "cache_miss": duration(""),
        },
        "batch_stats": [],
        "response_stats": {},
        "memory_usage": [],
    }
