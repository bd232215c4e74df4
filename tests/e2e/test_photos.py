"""The main job on real photos: 1,000 of them from 16 clients at once, `r` cycling, each answer as computed offline."""

from __future__ import annotations

import csv
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm import create_model
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

import tome_core
from tests.e2e.service import StartService

SHARED = Path(__file__).resolve().parents[3] / "shared"
PHOTOS = SHARED / "data" / "nips2017-dev"
WEIGHTS = SHARED / "models" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
NAME = "vit_tiny_patch16_224"
TOKENS_LEFT = {0: 197, 8: 101, 13: 41, 16: 11}  # at r=16 the last block has 21 tokens and can merge but 10
LADDER = tuple(TOKENS_LEFT)

PUBLISHED_TOP1 = {0: 0.891, 8: 0.883, 13: 0.871, 16: 0.834}
"""Of the published implementation on all 1,000 photos, squashed to 224 px; each r has a quarter of them here."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PHOTOS.exists() and WEIGHTS.exists()), reason="the shared photos and weights are not here"),
]


def test_every_answer_over_http_is_the_offline_answer_for_that_photo_and_that_r(start_service: StartService) -> None:
    with (PHOTOS / "labels.csv").open(newline="") as file:
        photos = [(PHOTOS / "images" / row["file"], int(row["label"])) for row in csv.DictReader(file)]
    rs = list(itertools.islice(itertools.cycle(LADDER), len(photos)))
    service = start_service("--model", NAME, "--weights", str(WEIGHTS))
    with httpx.Client(base_url=service.url, timeout=60, limits=httpx.Limits(max_connections=16)) as client:

        def ask(path: Path, r: int) -> dict[str, Any]:
            response = client.post("/classify", params={"r": r, "top_k": 1000}, content=path.read_bytes(), headers=JPEG)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        with ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(ask, [path for path, _ in photos], rs))
    samples = service.metrics()

    probabilities = offline([path for path, _ in photos], rs)
    largest_batch = 0
    for answer, expected, r in zip(answers, probabilities, rs, strict=True):
        top_k = answer["results"][0]["top_k"]
        got = torch.zeros(1000)
        got[[each["index"] for each in top_k]] = torch.tensor([each["score"] for each in top_k])
        assert (answer["r"], answer["tokens"]) == (r, TOKENS_LEFT[r])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        largest_batch = max(largest_batch, answer["batch_size"])
    assert largest_batch > 1

    for r in LADDER:
        right = [
            a["results"][0]["top_k"][0]["index"] == label
            for a, (_, label), asked in zip(answers, photos, rs, strict=True)
            if asked == r
        ]
        # The images computed under an r are the images asked for under it: no batch mixed two.
        assert samples[f'tome_batch_size_sum{{model="{NAME}",r="{r}"}}'] == len(right) == 250
        assert samples[f'tome_images_total{{model="{NAME}",r="{r}"}}'] == 250
        assert sum(right) / len(right) >= PUBLISHED_TOP1[r] - 0.05


JPEG = {"content-type": "image/jpeg"}


@torch.inference_mode()
def offline(paths: list[Path], rs: list[int]) -> torch.Tensor:
    """What timm's own preprocessing and tome_core give, (photos, classes)."""
    model = create_model(NAME)
    model.load_state_dict(load_file(WEIGHTS))
    merged = tome_core.wrap(model.eval())
    config = resolve_model_data_config(model)
    transform: Any = create_transform(**config, is_training=False)
    probabilities = torch.empty(len(paths), 1000)
    for r in LADDER:
        chosen = [index for index, each in enumerate(rs) if each == r]
        for start in range(0, len(chosen), 50):
            batch = chosen[start : start + 50]
            images = torch.stack([transform(Image.open(paths[index]).convert("RGB")) for index in batch])
            probabilities[batch] = merged(images, r).softmax(dim=1)
    return probabilities
