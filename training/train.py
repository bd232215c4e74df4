"""Trains the bundled model: a 64 px ViT-Ti with patch 4, merging a random `r` of tokens at each step.

python -m training.train --data FOLDER --run RUN --teacher teacher.safetensors [--minutes 20]

Uses all GPUs. It prints its progress, keeps a checkpoint in RUN, and resumes from it when started again. `--minutes`
fits the training into a time; `--stop-after-s` splits a long one into parts. `training.export` writes the finished
model.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.accuracy import top1
from training.augment import augment, mix
from training.data import load_labels, load_split
from training.pace import LARGEST_R, learning_rate, random_r
from training.parallel import (
    add_arguments,
    alike,
    average_,
    clip_,
    flat_gradients,
    from_first,
    launch,
    mine,
    rank,
    reseed,
    say,
    world_size,
)
from training.replay import Backward, Replay
from training.student import Average, Student, backward_of, decay_groups
from training.teacher import Teacher

CHECKPOINT_EVERY_S = 60
REHEARSALS = 5  # steps from which the length of the first epoch is estimated


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files and classes.csv")
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--teacher", type=Path, required=True, help="weights written by training.teacher")
    parser.add_argument("--start", type=Path, help="safetensors file of a model trained before, to go on from")
    parser.add_argument("--cache", type=Path, help="folder for decoded pixels")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=500)
    length.add_argument("--minutes", type=float, help="instead: end in so many minutes, counted from this start")
    parser.add_argument("--batch-size", type=int, default=1024, help="of all GPUs together")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after-s", type=float, help="end early, after the epoch that would pass this time")
    add_arguments(parser)
    launch(work, parser.parse_args())


def work(device: torch.device, args: argparse.Namespace) -> None:
    """The work of each process: the same steps with the same weights, each on its own images."""
    start = time.monotonic()

    def clock() -> float:
        """Seconds since the start by process 0's clock, so that all decide alike."""
        return from_first(time.monotonic() - start, device)

    training = Training(device, args)
    training.rehearse()  # compiles and captures graphs
    captured_s = clock()
    for _ in range(REHEARSALS):
        training.rehearse()
    began_s = saved_s = now_s = clock()
    epoch_s, first = training.steps * (began_s - captured_s) / REHEARSALS, training.epoch
    stop = False
    while training.progress < 1 and not stop:
        left = args.epochs - training.epoch
        if args.minutes is not None:
            left = int((60 * args.minutes - now_s) / epoch_s)
        left = max(left, 1)  # otherwise the learning rate would not come down
        loss = training.run_epoch(left)
        if not math.isfinite(loss):
            raise SystemExit(f"the loss of epoch {training.epoch} is {loss}")
        now_s = clock()
        epoch_s = (now_s - began_s) / (training.epoch - first)
        say(f"epoch {training.epoch}/{training.epoch - 1 + left} loss {loss:.3f} {now_s:.0f} s")
        stop = args.stop_after_s is not None and now_s + epoch_s > args.stop_after_s
        if stop or training.progress == 1 or now_s - saved_s > CHECKPOINT_EVERY_S:
            saved_s = now_s
            say(f"top-1 {training.save():.4f}")


class Training:
    """A student in training, with everything that a checkpoint needs to resume.

    Attributes:
        epoch: Finished epochs.
        progress: Their share of the training, 0 to 1; at 1 the learning rate has come down.
        steps: Steps of an epoch.
    """

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        self._device, self._args, on_gpu = device, args, device.type == "cuda"
        self._train, self._val = (load_split(args.data, split, args.cache).to(device) for split in ("train", "val"))
        self.steps = len(self._train.images) // args.batch_size
        if not self.steps:
            raise SystemExit(f"--batch-size is {args.batch_size}; there are {len(self._train.images)} images")
        self._teacher = Teacher(args.teacher, len(load_labels(args.data).wnids), device)
        knows = top1(lambda images: self._teacher(images).logits, self._val)
        say(f"teacher top-1 {knows:.4f}")  # a poor teacher spoils the student, and nothing else would show it
        torch.manual_seed(args.seed)  # the same first weights in every process
        self._student = Student(self._teacher.width).to(device).train()
        if args.start:
            self._student.model.load_state_dict(load_file(args.start))
        self._average = Average(self._student.model)
        self._gradients = flat_gradients(self._student.parameters())
        self._optimizer = torch.optim.AdamW(decay_groups(self._student), args.lr, betas=(0.9, 0.99), fused=on_gpu)
        self._backward: Backward = backward_of(self._student, self._gradients, device)
        if on_gpu:
            self._backward = Replay(self._backward, range(LARGEST_R + 1))
        self.epoch, self.progress = 0, 0.0
        self._checkpoint = args.run / "checkpoint.pt"
        if self._checkpoint.exists():
            self._resume()

    def rehearse(self) -> None:
        """A step that learns nothing; it ends when all processes have made it."""
        self._learn(self._train.images[: self._args.batch_size // world_size()], 0)
        average_(self._gradients).norm().item()

    def run_epoch(self, left: int) -> float:
        """Runs an epoch, the first of `left` that share the rest of the training evenly; returns the mean loss."""
        # a resumed training draws the same numbers as an uninterrupted one
        shared = reseed(self._args.seed + self.epoch)
        order = torch.randperm(len(self._train.images), generator=shared)[: self.steps * self._args.batch_size]
        part, total = (1 - self.progress) / left, torch.zeros((), device=self._device)
        for step, batch in enumerate(order.to(self._device).split(self._args.batch_size)):
            rate = learning_rate(self.progress + part * step / self.steps, self._args.lr)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            total += self._learn(self._train.images[mine(batch)], random_r(shared))
            clip_(average_(self._gradients))
            self._optimizer.step()
            self._average.update(self._student.model, self.epoch * self.steps + step)
        self.epoch, self.progress = self.epoch + 1, 1.0 if left == 1 else self.progress + part
        return average_(total).item() / float(self.steps)

    def save(self) -> float:
        """Writes the checkpoint and returns the average's top-1, which no decision depends on."""
        state = {
            "student": self._student.state_dict(),
            "average": self._average.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "epoch": self.epoch,
            "progress": self.progress,
        }
        if rank() == 0:
            new = self._checkpoint.with_suffix(".new")
            new.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, new)
            new.rename(self._checkpoint)
        in_step = alike(torch.stack([weight.norm() for weight in self._student.parameters()]))
        assert in_step, "the processes' weights differ"
        return top1(self._average.model, self._val)

    def _learn(self, images: Tensor, r: int) -> Tensor:
        """The loss on images; its gradient is left in the flat buffer."""
        x = mix(augment(images)).images
        return self._backward(r, x, *self._teacher(x))

    def _resume(self) -> None:
        state = torch.load(self._checkpoint, map_location=self._device, weights_only=True)
        self._student.load_state_dict(state["student"])
        self._average.model.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.progress = state["epoch"], state["progress"]
        say(f"resumed after epoch {self.epoch}")


if __name__ == "__main__":
    main()
