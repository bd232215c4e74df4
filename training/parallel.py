"""Data parallel training: one process a device, each with its own images and the same weights.

Gradients are averaged by one all-reduce over one buffer. In a program that runs alone, every function here does the
same for the one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exists, but is not exported
from torch.multiprocessing.spawn import spawn

LOCALHOST = "127.0.0.1"
Work = Callable[[torch.device, argparse.Namespace], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `launch` reads."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, help="one a GPU (default: as many as there are GPUs; 1 on the CPU)")


def launch(work: Work, args: argparse.Namespace) -> None:
    """Runs `work(device, args)` in every process: spawned ones, or this one if there is only one.

    Args:
        work: A function of a module, so that a spawned process can import it.
        args: `device` and `processes` of `add_arguments`, `batch_size` (of all processes together), and the arguments
            of `work`.
    """
    processes = args.processes or (torch.cuda.device_count() if args.device == "cuda" else 1)
    if processes < 1:
        raise SystemExit(f"--processes is {processes}; it must be 1 or more, and --device {args.device} be there")
    if args.batch_size % processes:
        raise SystemExit(f"--batch-size is {args.batch_size}; it must be a multiple of the {processes} processes")
    if processes == 1:
        work(_device(args.device, 0), args)
        return
    store = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
    spawn(_member, (processes, store.port, work, args), nprocs=processes)


def rank() -> int:
    """This process's number; process 0 prints and writes for all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line: str) -> None:
    """Prints a line once, at once."""
    if rank() == 0:
        print(line, flush=True)


def reseed(seed: int) -> torch.Generator:
    """Reseeds random numbers: a generator that all processes share (returned), and torch's own in each process."""
    shared = torch.Generator().manual_seed(seed)
    own = torch.randint(2**62, (world_size(),), generator=shared)
    torch.manual_seed(int(own[rank()]))
    return shared


def mine(rows: Tensor) -> Tensor:
    """This process's part of rows that are distributed over all processes."""
    return rows.tensor_split(world_size())[rank()]


def from_first(value: float, device: torch.device) -> float:
    """Process 0's value in every process, because clocks differ and decisions must not."""
    if not dist.is_initialized():
        return value
    said = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(said, 0)
    return float(said)


def average_(values: Tensor) -> Tensor:
    """The mean over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world_size()
    return values


def alike(values: Tensor) -> bool:
    """Whether all processes have the same values, bit for bit."""
    if not dist.is_initialized():
        return True
    bounds = torch.stack([values, -values])
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    return torch.equal(bounds[0], -bounds[1])


def flat_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Gives every parameter a gradient of zeros that is a view of one buffer, and returns the buffer.

    Backward passes add to it, so zero it in place and never drop a gradient.
    """
    parameters = list(parameters)
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def clip_(gradients: Tensor, max_norm: float = 1.0) -> None:
    """Shortens the flat gradient to a norm of at most `max_norm`, without waiting for the device."""
    gradients *= (max_norm / (gradients.norm() + 1e-6)).clamp(max=1)


def _member(rank: int, processes: int, port: int, work: Work, args: argparse.Namespace) -> None:
    device = _device(args.device, rank)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=TCPStore(LOCALHOST, port),
        rank=rank,
        world_size=processes,
        device_id=device if device.type == "cuda" else None,  # connects now, so that a failure comes before the rest
    )
    work(device, args)
    dist.destroy_process_group()


def _device(name: str, rank: int) -> torch.device:
    if name != "cuda":
        return torch.device(name)
    torch.cuda.set_device(rank)
    # graphs cannot be captured on the default stream; everything runs on this one
    torch.cuda.set_stream(torch.cuda.Stream())
    return torch.device("cuda", rank)
