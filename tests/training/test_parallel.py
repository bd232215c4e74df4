"""Two processes that train together against one that trains alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import members
from tests.training.conftest import STEPS, DataSet
from training.parallel import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(data: DataSet, teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, and for comparison this one, left what they did."""
    out = tmp_path_factory.mktemp("out")
    args = argparse.Namespace(
        **{"device": "cpu", "processes": 2, "data": data.folder, "teacher": teacher_weights, "cache": None},
        **{"epochs": 2, "minutes": None, "batch_size": 2, "lr": 1e-3, "seed": 0, "start": None, "out": out},
    )
    launch(members.member, args)
    args.processes = 1
    launch(members.step, args)
    return out


def told(out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"told-{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_step_as_one_does_with_all_their_images(out: Path) -> None:
    alone = torch.load(out / "step-0-of-1.pt", weights_only=True)
    first, second = (torch.load(out / f"step-{rank}-of-2.pt", weights_only=True) for rank in range(2))
    assert len(first) == 4
    for one, other, expected in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        assert expected.norm() > 0
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)


def test_processes_share_some_random_numbers_and_have_others_of_their_own(out: Path) -> None:
    first, second = told(out)
    assert first["world_size"] == second["world_size"] == 2
    assert torch.equal(first["shared"], second["shared"])
    assert not torch.isin(first["own"], second["own"]).any()


def test_rows_are_shared_out_and_each_goes_to_one_process(out: Path) -> None:
    assert torch.equal(torch.cat([process["mine"] for process in told(out)]), torch.arange(5))


def test_processes_agree_on_means_and_on_what_the_first_says(out: Path) -> None:
    for process in told(out):
        assert process["first"] == 10
        assert torch.equal(process["average"], torch.tensor([1.5, 3]))
        assert process["alike"] == [True, False]


def test_two_processes_resume_as_if_they_had_never_stopped(out: Path) -> None:
    unbroken, parts = (torch.load(out / run / "checkpoint.pt", weights_only=True) for run in ("unbroken", "parts"))
    assert (parts["epoch"], parts["progress"]) == (2, 1)
    assert {int(moments["step"]) for moments in parts["optimizer"]["state"].values()} == {2 * STEPS}
    for which in ("student", "average"):
        for name, weight in unbroken[which].items():
            assert torch.equal(weight, parts[which][name]), name
