"""A merging model at one `r`, recorded as a CUDA graph and replayed, so that kernels are not launched one by one.

A forward pass launches about eighty kernels. For a small model or a few images, the launches take longer than the
kernels. Token counts depend on the schedule alone, so one recording serves every batch of a shape.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tome_core.fixed import FixedR
from tome_core.schedule import RLike
from tome_core.vit import MergedViT


class CudaRecorder:
    """Records CUDA graphs that share one memory pool, because no two of them run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> CudaRecording:
        """Records `compute` on the current device, after two warm-up calls."""
        for _ in range(2):
            compute()
        torch.cuda.synchronize()
        try:
            return CudaRecording(compute, self._pool)
        except Exception:
            self._pool = torch.cuda.graph_pool_handle()  # a pool that a recording was broken off in takes no other
            raise


class CudaRecording:
    """A function of fixed inputs, recorded.

    Attributes:
        output: Its result, which the next replay overwrites.
    """

    def __init__(self, compute: Callable[[], Tensor], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = compute()

    def replay(self) -> None:
        """Computes `output` from the present content of the inputs."""
        self._graph.replay()


class Recorded(nn.Module):
    """A merging model at one `r`, replayed: `Recorded(merged, 13)(images)` is `merged(images, 13)`.

    The first call with a shape of images records it, which takes some forward passes; every later one replays it.
    If it cannot record (on a CPU, with gradients, inside another graph), it calls the model. The model's
    weights may change in place; they must not move. Several threads may call it; they take turns.

    Args:
        merged: The merging model.
        r: Tokens merged in each block: a number, a list of one per block, or a Ramp; None means `merged.r`.
        max_shapes: Most shapes whose recordings are kept, each with its activations in the GPU's memory; the one unused
            for longest is dropped first.

    Raises:
        ValueError: r is negative, or lists more blocks than there are.
    """

    def __init__(self, merged: MergedViT, r: RLike | None = None, max_shapes: int = 4) -> None:
        super().__init__()
        self.fixed = FixedR(merged, r)
        self.training = merged.training
        self._max_shapes = max_shapes
        self._forget()

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images, as `MergedViT.forward` takes them; gives logits (B, K)."""
        merged = self.fixed.merged
        if self.training or merged.has_training_layers() or not _can_record(images):
            return self.fixed(images)  # type: ignore[no-any-return]
        # Hooks and autocast make another graph of the same images: the implementation and its reason tell them apart.
        # Tuned numbers that were loaded since are those of another model.
        how = merged.at(self.fixed.schedule), merged.implementation(images), _autocast(images)
        key = (images.shape, images.dtype, images.device, *how)
        with self._lock, torch.cuda.device(images.device), torch.inference_mode(False), torch.no_grad():
            done = self._done.setdefault(images.device, torch.cuda.Event())
            done.wait()  # recordings share memory, and another thread's stream may still use it
            held, recording = self._recorded(key, images)
            held.copy_(images)
            recording.replay()
            logits = recording.output.clone()
            done.record()
        return logits

    def _recorded(self, key: tuple[Any, ...], images: Tensor) -> tuple[Tensor, CudaRecording]:
        if key not in self._recordings:
            recorder = self._recorders.setdefault(images.device, CudaRecorder())
            held = images.clone(memory_format=torch.contiguous_format)
            self._recordings[key] = held, recorder(lambda: self.fixed(held))
            if len(self._recordings) > self._max_shapes:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._recorders: dict[torch.device, CudaRecorder] = {}
        self._done: dict[torch.device, torch.cuda.Event] = {}
        self._recordings: OrderedDict[tuple[Any, ...], tuple[Tensor, CudaRecording]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_recorders", "_done", "_recordings")  # a copy records for itself
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()


def _can_record(images: Tensor) -> bool:
    if images.device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _autocast(images: Tensor) -> torch.dtype | None:
    """The dtype of products under autocast on the images' device; None if it is off."""
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
