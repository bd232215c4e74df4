"""What the tests of model folders share: folders made, changed, loaded and asked, and photos for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from server.device.models import LoadedModel, load_model
from server.device.runner import Runner
from server.model_spec import ModelSpec


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def random_vit(folder: Path, num_classes: int = 50, **changes: Any) -> Path:
    """Writes a small random ViT of 64 patches: at a high `r` many of its answers change, and tuning mends some."""
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "global_pool": "avg"}
    size: dict[str, Any] = small | changes
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **size)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "crop_mode": "center", "num_classes": num_classes}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": num_classes, "model_args": size}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": pretrained}))
    return folder


def noise_photos(folder: Path, count: int) -> Path:
    """Writes small pictures of noise."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for index in range(count):
        noise = Image.frombytes("RGB", (6, 6), bytes(torch.randint(256, (6 * 6 * 3,)).tolist()))
        noise.resize((44, 36)).save(folder / f"{index}.png")
    return folder


def load(folder: Path, **more: Any) -> LoadedModel:
    """A folder's model."""
    return load_model(ModelSpec(source=f"local-dir:{folder}", **({"name": "mine"} | more)))


def classify(loaded: LoadedModel) -> tuple[list[str], list[float]]:
    """Warms the model up as a start does; gives the labels for one grey image, likeliest first, and their scores."""
    info = loaded.info
    runner = Runner({info.name: loaded}, "cpu", "fp32")
    key = info.batch_key(info.schedule(0))
    runner.warm_up(key)
    pixels = torch.full((1, *key.input_size, 3), 100, dtype=torch.uint8)
    ((indices, scores),) = runner.top_k(key, pixels, len(info.labels))
    return [info.labels[index] for index in indices], scores
