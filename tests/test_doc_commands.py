"""Commands that the documentation shows inside a sentence, and those of the benchmarks, are accepted."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest

from server.cli import COMMANDS, main
from server.keys import KEYS
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"R": "13", "B": "8"}
"""Words of the pages that stand for a number."""


class ParsedError(Exception):
    """The command line was accepted, and nothing else is to happen."""


@pytest.fixture(autouse=True)
def may_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence may leave out what a command requires."""

    def error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            raise ParsedError
        pytest.fail(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", error)


def spans_of(page: str) -> list[str]:
    """What stands in code on a page: each line of a block, and each piece inside a sentence."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands_of(page: str, pattern: str) -> list[list[str]]:
    """The words behind each match of a pattern; a command that leaves something out, or has no flag, is none."""
    found = [re.fullmatch(rf"{pattern} ?(.*)", span) for span in spans_of(page)]
    said = [
        match for match in found if match and "--" in match[2] and not re.search(r"\.\.\. |\.\.\.$|\[|--help", match[2])
    ]
    return [
        [match[1], *(PLACEHOLDERS.get(word, word) for word in shlex.split(match[2], comments=True))] for match in said
    ]


BENCHMARKS = [
    (page, words) for page in PAGES for words in commands_of(page, r"python -m ((?:benchmarks|training)\.\w+)")
]
IN_SENTENCES = [(page, words) for page in PAGES for words in commands_of(page, rf"tome-server ({'|'.join(COMMANDS)})")]


def test_the_pages_show_commands() -> None:
    assert len(BENCHMARKS) > 10 and len(IN_SENTENCES) > 10


@pytest.mark.parametrize(
    ("page", "words"), BENCHMARKS, ids=lambda value: value[0] if isinstance(value, list) else value
)
def test_a_command_of_a_benchmark_is_accepted(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        whole(parser, *arguments)
        raise ParsedError

    module = importlib.import_module(words[0])
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(ParsedError):
        module.main()


@pytest.mark.parametrize(
    ("page", "words"), IN_SENTENCES, ids=lambda value: value[0] if isinstance(value, list) else value
)
def test_a_command_of_the_server_is_accepted(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[argparse.Namespace] = []

    def run(settings: Settings, args: argparse.Namespace) -> int:
        ran.append(args)
        return 0

    monkeypatch.setattr(COMMANDS[words[0]], "run", run)
    monkeypatch.setattr("server.cli.keep_caches_in", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    for name in KEYS:
        (tmp_path / f"{name.removesuffix('_key')}.key").write_text("secret")  # as the pages call these files
    with contextlib.suppress(ParsedError):
        assert main(words) == 0 and len(ran) == 1
