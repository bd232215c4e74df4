"""The endpoints of the models: what they are, and the deployment's `r`, read and changed live."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response

from server.api.access import ERRORS, UsingEngine, check_admin_key, check_key
from server.api.body import parse, read_json
from server.api.schemas import (
    AutoBounds,
    Backend,
    BatchSeconds,
    CurveRow,
    ModelCurve,
    ModelDetail,
    ModelList,
    ModelSummary,
    PatchModel,
)
from server.calibration import curve as curves
from server.dial import AutoR, RSetting, parse_setting, r_of
from server.errors import InvalidError, shown
from server.types import Deployment, Engine, ModelInfo, find_model

router = APIRouter(prefix="/v1/models", responses=ERRORS)

_ETAG = re.compile(r'"?([0-9]{1,18})"?')
_PATCH_BODY = {"required": True, "content": {"application/json": {"schema": PatchModel.model_json_schema()}}}


@router.get("", dependencies=[Depends(check_key)])
async def list_models(engine: UsingEngine) -> ModelList:
    """The models that are served, the default first."""
    return ModelList(
        models=[_summary(info, await engine.deployment(info.name), engine) for info in engine.catalog().values()]
    )


@router.get("/{name}", dependencies=[Depends(check_key)])
async def get_model(name: str, response: Response, engine: UsingEngine) -> ModelDetail:
    """One model: classes, input size, blocks, range of r, and token counts for each r."""
    info = find_model(engine.catalog(), name)
    return _detail(info, await engine.deployment(name), engine, response)


@router.get("/{name}/curve", dependencies=[Depends(check_key)])
async def get_curve(name: str, engine: UsingEngine) -> ModelCurve:
    """What each r of a model costs and keeps, as `tome-server calibrate` measured it, at the speeds of this moment."""
    curve = await engine.curve(find_model(engine.catalog(), name).name)
    facts = curve.facts
    return ModelCurve(
        model=curve.model,
        device=facts.device,
        precision=facts.precision,
        backend=facts.backend,
        measured=curve.measured,
        photos=curve.photos,
        rows=[_curve_row(row) for row in curve.rows],
    )


@router.patch("/{name}", dependencies=[Depends(check_admin_key)], openapi_extra={"requestBody": _PATCH_BODY})
async def patch_model(
    name: str,
    request: Request,
    response: Response,
    engine: UsingEngine,
    if_match: Annotated[str | None, Header()] = None,
) -> ModelDetail:
    """Changes the deployment's r from the next request on, over restarts too; If-Match guards against a race."""
    info = find_model(engine.catalog(), name)
    r = read_change(await read_json(request), info)
    deployment = await engine.set_r(name, r, _version(if_match))
    return _detail(info, deployment, engine, response)


def read_change(said: dict[str, Any], info: ModelInfo) -> RSetting:
    """The deployment's `r` that a PATCH body says; raises InvalidError where the model cannot merge like that."""
    change = parse(PatchModel, said)
    r = parse_setting(change.r, change.max_r, change.min_agreement)
    if not isinstance(r, AutoR):
        return r_of(info.schedule(r, change.inflect))
    if change.inflect is not None:
        raise InvalidError("inflect goes with a single r, not with auto")
    return r


def _curve_row(row: curves.CurveRow) -> CurveRow:
    assert row.line is not None and row.images_per_s is not None, "an engine knows its speeds"
    return CurveRow(
        r=r_of(row.r),
        schedule=list(row.r),
        batch_s=BatchSeconds(a=row.line[0], b=row.line[1]),
        images_per_s=row.images_per_s,
        **row.model_dump(include={"tokens", "gflops", "agreement", "agreement_interval", "top1"}),
    )


def _version(if_match: str | None) -> int | None:
    if if_match is None or if_match == "*":
        return None
    etag = _ETAG.fullmatch(if_match)
    if etag is None:
        raise InvalidError(f'If-Match is {shown(if_match)}; send the ETag of a model, like "3"')
    return int(etag[1])


def _summary(info: ModelInfo, deployment: Deployment, engine: Engine) -> ModelSummary:
    return ModelSummary(
        name=info.name,
        architecture=info.architecture,
        source=info.source,
        is_default=info.name == next(iter(engine.catalog())),
        r="auto" if isinstance(deployment.r, AutoR) else deployment.r,
        auto=AutoBounds(**asdict(deployment.r)) if isinstance(deployment.r, AutoR) else None,
        config_version=deployment.config_version,
    )


def _detail(info: ModelInfo, deployment: Deployment, engine: Engine, response: Response) -> ModelDetail:
    response.headers["etag"] = f'"{deployment.config_version}"'
    return ModelDetail(
        **_summary(info, deployment, engine).model_dump(),
        backend=Backend(**asdict(info.backend)) if info.backend else None,
        num_classes=len(info.labels),
        classes=list(info.labels),
        input_size=info.preprocessing.input_size,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
        num_prefix_tokens=info.num_prefix_tokens,
        min_r=0,
        max_r=info.max_r,
        token_counts=_token_counts(info),
    )


@functools.cache
def _token_counts(info: ModelInfo) -> dict[int, list[int]]:
    return {r: list(info.token_counts(info.schedule(r))) for r in range(info.max_r + 1)}
