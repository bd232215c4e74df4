"""`tome-server schedule` on a tiny model: it reports on photos that it did not choose on, and keeps the budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from server.cli import main
from server.device.models import load_model
from server.dial import parse_r
from server.settings import ModelSpec
from tests.server.conftest import encode
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions

COUNT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a tiny random model of four blocks and 65 tokens."""
    folder = tmp_path_factory.mktemp("models") / "four-blocks"
    folder.mkdir()
    size: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=7, **size)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    save_file(network.state_dict(), folder / "model.safetensors")
    pretrained: dict[str, Any] = {"input_size": [3, 32, 32], "crop_mode": "center", "num_classes": 7}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": size,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model", f"local-dir:{folder}"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    for index in range(COUNT):
        noise = Image.frombytes("RGB", (8, 8), bytes(torch.randint(256, (8 * 8 * 3,)).tolist()))
        (folder / f"{index}.png").write_bytes(encode(noise.resize((40, 32))))
    return folder


def command(model: list[str], photos: Path, *more: str) -> list[str]:
    few = ["--rounds", "1", "--trials", "8", "--threads", "1"]
    return ["schedule", *model, "--images", str(photos), *few, *more]


def found(said: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result


def test_it_reports_beside_constant_r_at_each_speed_up(
    model: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, photos, "--speedup", "1.3", "1.6")) == 0
    shown = capsys.readouterr()
    result = found(shown.out)
    assert (result["model"], result["cost"]) == ("four-blocks", "GFLOPs")
    assert result["photos_to_choose_on"] == result["photos_to_report_on"] == COUNT // 2
    assert [(row["speedup"], row["kind"]) for row in result["rows"]] == [
        (speedup, kind) for speedup in (1.3, 1.6) for kind in ("found", "even", "constant")
    ]
    counted = dimensions(load_model(ModelSpec.model_validate({"source": model[1]})).merged)
    for row in result["rows"]:
        assert row["cost"] == flops(counted, row["r"]) / 1e9 <= result["timm_cost"] / row["speedup"]
        assert row["interval"][0] <= row["agreement"] <= row["interval"][1]
        assert 0 < row["distance"] < 1
        assert row["agreement"] * 12 == pytest.approx(round(row["agreement"] * 12))
    for best, even, constant in (result["rows"][:3], result["rows"][3:]):
        assert best["gain"] is None and len(set(constant["r"])) == 1
        assert best["r"][-1] == even["r"][-1] == 0  # nothing reads what the last block merges
        for row in (even, constant):
            assert row["gain"][0] == pytest.approx(best["agreement"] - row["agreement"])
    table = shown.out.splitlines()
    assert len(table) == 1 + 6 + 1 and "GFLOPs" in table[0] and "1.60x" in table[4]
    assert "round 1 of 1" in shown.err


def test_what_it_finds_can_be_served(
    model: list[str], photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "schedule.json"
    assert main(command(model, photos, "--speedup", "1.5", "-o", str(saved))) == 0
    shown = capsys.readouterr().out
    result = found(shown)
    assert json.loads(saved.read_text()) == result
    text = shown.splitlines()[1].split()[-1]
    assert parse_r(text) == tuple(result["rows"][0]["r"])
    assert main(["classify", *model, "--json", "--r", text, str(photos / "0.png")]) == 0
    assert json.loads(capsys.readouterr().out)["r"] == result["rows"][0]["r"]


def test_the_seed_decides_everything(model: list[str], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in ("3", "3", "4"):
        assert main(command(model, photos, "--speedup", "1.5", "--seed", seed)) == 0
        said.append(found(capsys.readouterr().out))
    assert said[0] == said[1] != said[2]


def test_latency_is_measured(model: list[str], photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 0.2 times as fast as timm is within reach however slow merging is in so small a model.
    assert main(command(model, photos, "--speedup", "0.2", "--cost", "latency", "--max-batch-size", "4")) == 0
    shown = capsys.readouterr()
    result = found(shown.out)
    assert result["cost"] == "ms/4" and all(row["cost"] > 0 for row in result["rows"])
    assert "latency is predicted to" in shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--speedup", "50"], "speedup is 50"),
        (["--speedup", "-1"], "speedup is -1"),
        (["--speedup", "1.5", "--photos", "1"], "photos is 1"),
        (["--speedup", "1.5", "--trials", "3"], "trials is 3"),
        (["--speedup", "1.5", "--rounds", "0"], "rounds is 0"),
        (["--speedup", "1.5", "--images", "nowhere"], "nowhere"),
        (["--speedup", "1.5", "-o", "nowhere/schedule.json"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], named: str, model: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, photos, *arguments)) == 1
    assert named in capsys.readouterr().err
