"""Uploads stay in memory: they need no folder for temporary files, which may be full or read-only."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from tests.server.conftest import grey_png, serving


async def test_a_large_form_is_read_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    async with serving() as service:
        answer = await service.client.post("/classify", files={"image": ("a.png", grey_png() + bytes(3 << 20))})
        assert answer.status_code == 200
