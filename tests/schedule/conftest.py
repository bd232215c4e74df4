"""A tiny model, and noise for photos."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.model_folders import noise_photos, random_vit

COUNT = 24


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model of four blocks and 65 tokens, as `--model` names it; merging changes some of its answers."""
    folder = tmp_path_factory.mktemp("models") / "four-blocks"
    return f"local-dir:{random_vit(folder, global_pool='token')}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_photos(tmp_path_factory.mktemp("photos"), COUNT)
