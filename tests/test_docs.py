"""The documentation: its commands are accepted, its Python runs, its links lead somewhere, and it stays short."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from server.cli import COMMANDS, main
from server.keys import KEYS
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", ["library.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)  # for what a block writes
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def commands_of(page: str) -> list[list[str]]:
    """The arguments of every `tome-server` in the blocks of a page."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.fullmatch(r"(?:docker run .* tome-server +)?tome-server ([a-z].*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match and "──" not in match[1]]  # a drawing's


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_every_command_of_a_page_is_accepted(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(settings: Settings, args: argparse.Namespace) -> int:
        ran.append(args.command)
        return 0

    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr("server.cli.keep_caches_in", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    for name in KEYS:
        (tmp_path / f"{name.removesuffix('_key')}.key").write_text("secret")  # as the pages call these files
    commands = commands_of(page)
    for arguments in commands:
        assert main(arguments) == 0, arguments
    assert ran == [arguments[0] for arguments in commands]


def source_of(module: str) -> str:
    return (ROOT / f"{module.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_flag_of_a_benchmark_is_one(page: str) -> None:
    quoted = re.findall(r"`+([^`]+)`+", (ROOT / page).read_text())
    commands = [part.split() for text in quoted for part in re.split(r"python -m\s+", text)[1:]]
    for module, *words in commands:
        source = source_of(module)
        source += "".join(map(source_of, re.findall(r"^from (benchmarks\.\w+) import", source, flags=re.MULTILINE)))
        flags = {word for word in words if word.startswith("--")}
        settings = {f"--{name.replace('_', '-')}" for name in Settings.model_fields if "SETTINGS" in source}
        assert {flag for flag in flags if f'"{flag}"' not in source} <= settings, module


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_map_of_the_architecture_is_two_screens() -> None:
    lines = (DOCS / "architecture.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


def anchors_of(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "server/bundled/README.md"])
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
