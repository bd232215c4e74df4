"""The files of the page: their types, their caching, and the headers that keep them from loading anything else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.conftest import assert_is_error, serving

BROWSER = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
STATIC = Path(__file__).resolve().parents[2] / "server" / "static"


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_a_page_needs_no_key_and_may_load_nothing_from_elsewhere(path: str) -> None:
    async with serving(api_key="secret") as service:
        response = await service.client.get(path, headers=BROWSER)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"].split("; ")
        assert policy[:2] == ["default-src 'self'", "img-src 'self' data: blob:"]
        assert "unsafe" not in response.headers["content-security-policy"]


async def test_what_has_not_changed_is_not_sent_again() -> None:
    async with serving() as service:
        for path in ("/", "/static/app.css"):
            first = await service.client.get(path, headers=BROWSER)
            again = await service.client.get(path, headers={**BROWSER, "if-none-match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["cache-control"] == first.headers["cache-control"] == "no-cache"


async def test_every_file_that_the_page_names_is_there() -> None:
    async with serving() as service:
        html = "".join([(await service.client.get(path, headers=BROWSER)).text for path in ("/", "/docs")])
        named = set(re.findall(r'(?:src|href|data-sample)="(static/[^"]+)"', html))
        for module in STATIC.glob("*.js"):
            named |= {f"static/{name}" for name in re.findall(r'from "\./([^"]+)"', module.read_text())}
        assert {"static/app.css", "static/app.js"} < named
        for path in named:
            assert (await service.client.get(f"/{path}")).status_code == 200, path
        assert {f"static/{file.name}" for file in STATIC.glob("*.*")} - named == {
            "static/index.html",
            "static/docs.html",
        }


@pytest.mark.parametrize("path", ["/static/nothing.js", "/static/../api/app.py", "/static/%2e%2e/api/app.py"])
async def test_no_other_file_is_given_away(path: str) -> None:
    async with serving() as service:
        assert_is_error(await service.client.get(path), 404, "not_found")


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_a_page_names_everything_by_an_address_relative_to_its_own(name: str) -> None:
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', (STATIC / name).read_text())
    assert addresses and not [address for address in addresses if address.startswith("/")]
    for module in STATIC.glob("*.js"):
        assert not re.findall(r"""fetch\(["'`]/|send\(["'`]/""", module.read_text()), module


def test_a_page_has_no_inline_script_or_style_and_names_no_other_origin() -> None:
    html = (STATIC / "index.html").read_text() + (STATIC / "docs.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", html)
    for file in STATIC.glob("*.*"):
        if file.suffix in (".html", ".css", ".js"):
            # The name of SVG's namespace is no address.
            assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|//cdn|@import", file.read_text()), file


def test_samples_are_small() -> None:
    samples = list((STATIC / "samples").glob("*.jpg"))
    assert len(samples) >= 4
    assert all(sample.stat().st_size < 40_000 for sample in samples)


PAIRS = [  # what is written on what
    *[(ink, ground) for ink in ("ink", "soft", "a", "b", "good", "bad") for ground in ("ground", "card")],
    ("bad", "bad-fill"),
    ("ink", "a-fill"),
    ("ink", "b-fill"),
    ("soft", "a-fill"),
    ("soft", "b-fill"),
    ("ground", "a"),
    ("ground", "b"),
]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: int) -> None:
    css = (STATIC / "app.css").read_text()
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]))
    ratios = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in PAIRS}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}  # WCAG AA


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
