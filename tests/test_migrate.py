"""docs/migrate.md: the model that it makes is served, and what it tells people to ask is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from server.cli import main
from server.settings import DEFAULT_PROTOCOLS
from tests.server.conftest import serving

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "migrate.md").read_text()


def test_the_model_folder_that_the_page_makes_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    (checks,) = re.findall(r"`tome-server (models --check \S+)`", TEXT)
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=2).state_dict(), "model.pth")
    exec(compile(block, "migrate.md", "exec"), {})
    assert main(checks.split()) == 0
    assert "2 classes" in capsys.readouterr().out


def asked_paths() -> set[str]:
    """Every path of our server that the page names, in a sentence or in a line of curl."""
    named = re.findall(r"`(?:POST )?(/[^`\s]*)`", TEXT.replace("\n", " "))
    blocks = re.findall(r"^```\w*\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    ours = "".join(block for block in blocks if "tome-server" in block)
    return {*named, *(path or "/" for path in re.findall(r"curl.* '?localhost:\d+([^\s?']*)", ours))}


async def test_every_path_that_the_page_names_is_served() -> None:
    async with serving(protocol=[*DEFAULT_PROTOCOLS, "sagemaker", "vertex"]) as service:
        described = (await service.client.get("/openapi.json")).json()["paths"]
    served = [re.sub(r"\\\{[^}]+\}", "[^/]+", re.escape(path)) for path in described]
    asked = asked_paths()
    assert {"/", "/classify", "/predictions/cats"} <= asked
    assert [path for path in asked if not any(re.fullmatch(each, path) for each in served)] == []
