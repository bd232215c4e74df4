"""What the processes of a training do in the tests: a module of its own, for spawned processes import it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from training import parallel, student, teacher, train
from training.student import Student, backward_of

SMALL_STUDENT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL_TEACHER: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}


def member(device: torch.device, args: argparse.Namespace) -> None:
    """One of several processes: everything that the tests look at, each thing in a file of its own."""
    torch.set_num_threads(1)
    student.MODEL_ARGS |= SMALL_STUDENT
    teacher.MODEL_ARGS |= SMALL_TEACHER
    tell(device, args)
    step(device, args)
    for name, stops in (("unbroken", [None]), ("parts", [1e-9, None])):
        for stop_after_s in stops:
            train.work(device, argparse.Namespace(**vars(args), run=args.out / name, stop_after_s=stop_after_s))


def tell(device: torch.device, args: argparse.Namespace) -> None:
    """Writes what each process has for itself, and what it shares with the others."""
    rank = parallel.rank()
    shared = parallel.reseed(7)
    told = {
        "world_size": parallel.world_size(),
        "shared": torch.rand(3, generator=shared),
        "own": torch.rand(3),
        "mine": parallel.mine(torch.arange(5)),
        "first": parallel.from_first(10.0 + rank, device),
        "average": parallel.average_(torch.tensor([1.0, 2.0]) * (rank + 1)),
        "alike": [parallel.alike(torch.ones(2)), parallel.alike(torch.tensor([1.0, rank]))],
    }
    torch.save(told, args.out / f"told-{rank}.pt")


def step(device: torch.device, args: argparse.Namespace) -> None:
    """Three steps on batches that all processes share out; writes each step's gradient, then the weights."""
    torch.manual_seed(3)
    learner = Student(teacher_width=24).train()
    gradients = parallel.flat_gradients(learner.parameters())
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
    backward = backward_of(learner, gradients, device)
    seen: list[Tensor] = []
    for r in (0, 5, 16):
        batch = torch.rand(4, 3, 64, 64) * 2 - 1, 3 * torch.randn(4, 200), torch.randn(4, 24)
        backward(r, *map(parallel.mine, batch))
        seen.append(parallel.average_(gradients).clone())
        parallel.clip_(gradients)
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in learner.parameters()])
    torch.save([*seen, weights], args.out / f"step-{parallel.rank()}-of-{parallel.world_size()}.pt")
