"""The names of supported models are those of the installed timm, and the page that lists them is fresh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm

from benchmarks.coverage import declared
from tome_core import list_models, names
from tome_core.families import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "supported.md"


def test_the_classes_are_those_that_families_serve() -> None:
    assert set(names.COVERS) >= {cls.__name__ for family in FAMILIES for cls in family.model_classes}


def test_names_and_classes_are_what_timm_itself_says() -> None:
    wanted = {name: declared(name) for name in timm.list_models()}
    wanted = {name: cls for name, cls in wanted.items() if cls in names.COVERS and not name.endswith(names.REFUSED)}
    assert names.classes() == wanted
    assert list_models() == list(wanted)  # in timm's order


def test_a_pattern_is_a_part_of_the_name_or_has_wildcards() -> None:
    assert list_models("vit_tiny_patch16_2*") == ["vit_tiny_patch16_224"]
    assert "vit_small_patch16_dinov3" in list_models("dinov3") == list_models("*dinov3*")
    assert list_models("dinov3*") == list_models("swin") == []


def test_neither_timm_nor_torch_is_imported() -> None:
    code = "import sys, tome_core; assert tome_core.list_models(); assert not {'torch', 'timm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the page lists the names of timm 1.0.31")
def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == names.page() + "\n", "python -m tome_core.names > docs/supported.md"
