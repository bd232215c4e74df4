"""`/v1/config`: the deployment `r` of all models, read and changed at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import assert_is_error, grey_png, model_info, serving

BOTH = [model_info(), model_info("large")]


async def test_what_is_read_can_be_sent_back() -> None:
    async with serving(models=BOTH, r=2) as service:
        auto = {"r": "auto", "max_r": 6, "min_agreement": 0.9}
        sent = {"models": {"tiny": auto, "large": {"r": [4, 2, 0]}}}
        patched = await service.client.patch("/v1/config", json=sent)
        assert (patched.status_code, patched.json()) == (200, sent | {"config_version": 2})
        read = await service.client.get("/v1/config")
        assert (read.json(), read.headers["etag"]) == (patched.json(), patched.headers["etag"])
        again = await service.client.patch("/v1/config", json={"models": read.json()["models"]})
        assert again.json() == sent | {"config_version": 3}


async def test_a_change_leaves_other_models_and_counts_for_the_next_request(tmp_path: Path) -> None:
    async with serving(models=BOTH, r=2, state_file=tmp_path / "state.json") as service:
        ramp = {"r": 4, "inflect": -1}
        changed = await service.client.patch("/v1/config", json={"models": {"large": ramp}})
        assert changed.json()["models"] == {"tiny": {"r": 2}, "large": {"r": [8, 4, 0]}}
        answer = await service.classify(grey_png(100), model="large")
        assert (answer.json()["r"], answer.json()["config_version"]) == ([8, 4, 0], 2)
        model = await service.client.get("/v1/models/large")
        assert (model.json()["r"], model.headers["etag"]) == ([8, 4, 0], changed.headers["etag"])
    async with serving(models=BOTH, r=2, state_file=tmp_path / "state.json") as service:
        assert (await service.client.get("/v1/config")).json() == changed.json()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"models": {"tiny": {"r": 1}, "large": {"r": 9}}}, 422),
        ({"models": {"tiny": {"r": 1}, "huge": {"r": 1}}}, 404),
        ({"models": {"tiny": {"r": 1}, "large": {"r": "auto", "inflect": 1}}}, 422),
        ({"models": {"tiny": {"r": 1, "max_r": 3}}}, 422),
        ({"models": {"tiny": 1}}, 422),
        ({"models": {"tiny": {}}}, 422),
        ({"models": [], "config_version": 1}, 422),
        ({}, 422),
    ],
    ids=str,
)
async def test_one_wrong_entry_refuses_the_whole_change(body: Any, status: int) -> None:
    async with serving(models=BOTH) as service:
        refused = await service.client.patch("/v1/config", json=body)
        assert_is_error(refused, status, "not_found" if status == 404 else "invalid_parameter")
        unchanged = {"config_version": 1, "models": {"tiny": {"r": 0}, "large": {"r": 0}}}
        assert (await service.client.get("/v1/config")).json() == unchanged


async def test_an_etag_of_either_endpoint_guards_a_change() -> None:
    async with serving(models=BOTH) as service:
        etag = (await service.client.get("/v1/models/tiny")).headers["etag"]
        headers = {"if-match": etag}
        assert (
            await service.client.patch("/v1/config", json={"models": {"large": {"r": 1}}}, headers=headers)
        ).is_success
        stale = await service.client.patch("/v1/config", json={"models": {"large": {"r": 2}}}, headers=headers)
        assert_is_error(stale, 409, "conflict")
        assert stale.json()["error"]["details"] == {"config_version": 2}


async def test_reading_takes_the_users_key_and_changing_the_admins() -> None:
    async with serving(api_key="user", admin_key="admin") as service:
        change = {"models": {"tiny": {"r": 1}}}
        user, admin = ({"authorization": f"Bearer {key}"} for key in ("user", "admin"))
        assert_is_error(await service.client.get("/v1/config"), 401, "unauthorized")
        assert (await service.client.get("/v1/config", headers=user)).is_success
        assert_is_error(await service.client.patch("/v1/config", json=change, headers=user), 403, "forbidden")
        assert (await service.client.patch("/v1/config", json=change, headers=admin)).is_success
