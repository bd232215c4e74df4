"""A tiny model, noise for photos, and hypothesis without deadlines: a busy machine is no bug."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file

from tests.server.conftest import encode

settings.register_profile("schedule", deadline=None)
settings.load_profile("schedule")

COUNT = 24


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TOME_ variable of the developer's shell reaches a test."""
    for name in [name for name in os.environ if name.startswith("TOME_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model of four blocks and 65 tokens, as `--model` names it; merging changes some of its answers."""
    folder = tmp_path_factory.mktemp("models") / "four-blocks"
    folder.mkdir()
    size: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_file(network.state_dict(), folder / "model.safetensors")
    pretrained: dict[str, Any] = {"input_size": [3, 32, 32], "crop_mode": "center", "num_classes": 3}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": size,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    for index in range(COUNT):
        noise = Image.frombytes("RGB", (8, 8), bytes(torch.randint(256, (8 * 8 * 3,)).tolist()))
        (folder / f"{index}.png").write_bytes(encode(noise.resize((40, 32))))
    return folder
