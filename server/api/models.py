"""The endpoints of the models: what they are, and the deployment's `r`, read and changed live."""

from __future__ import annotations

import functools
from dataclasses import asdict

from fastapi import APIRouter, Request, Response

from server import curve as curves
from server.api.access import ERRORS, ForAdmins, ForUsers
from server.api.body import parse
from server.api.config import IfMatch, expected_version, setting_of, tag
from server.api.json_body import read_json
from server.api.schemas import (
    AgreementFrom,
    AutoBounds,
    Backend,
    BatchSeconds,
    Compiling,
    ModelCard,
    ModelCurve,
    ModelCurveRow,
    ModelDetail,
    ModelList,
    ModelSummary,
    PatchModel,
    SpeedFrom,
)
from server.dial import AutoR, r_of
from server.errors import NotFoundError
from server.ipc.engine import Engine
from server.types import Configuration, ModelInfo, find_model

router = APIRouter(prefix="/v1/models", responses=ERRORS)

_PATCH_BODY = {
    "required": True,
    "content": {"application/json": {"schema": PatchModel.model_json_schema(), "example": {"r": 13}}},
}


@router.get("")
async def list_models(service: ForUsers) -> ModelList:
    """The models that are served, the default first."""
    engine = service.engine
    configuration = await engine.configuration()
    # One may just have come.
    catalog = {name: info for name, info in engine.catalog().items() if name in configuration.models}
    return ModelList(
        models=[_summary(info, configuration, engine) for info in catalog.values()],
        data=[ModelCard(id=name) for name in catalog],
    )


@router.get("/{name}")
async def get_model(name: str, request: Request, response: Response, service: ForUsers) -> ModelDetail:
    """One model: classes, input size, blocks, range of r, and token counts for each r."""
    engine = service.engine
    info = find_model(engine.catalog(), name)
    return await _detail(info, await engine.configuration(), engine, request, response)


@router.get("/{name}/curve")
async def get_curve(name: str, service: ForUsers) -> ModelCurve:
    """The speed and the agreement of each r of a model, and where each of the two was measured."""
    curve = await service.engine.curve(find_model(service.engine.catalog(), name).name)
    speed = curve.speed_from
    return ModelCurve(
        model=curve.model,
        speed_from=SpeedFrom(**_place(speed.facts), measured=speed.measured),
        agreement_from=AgreementFrom(**_place(curve.facts), measured=curve.measured, photos=curve.photos),
        agreement_of=curve.agreement_of,
        rows=[_curve_row(row) for row in curve.rows],
    )


@router.patch("/{name}", openapi_extra={"requestBody": _PATCH_BODY})
async def patch_model(
    name: str,
    request: Request,
    response: Response,
    service: ForAdmins,
    if_match: IfMatch = None,
) -> ModelSummary:
    """Changes the deployment's r from the next request on, over restarts too; If-Match guards against a race."""
    engine = service.engine
    info = find_model(engine.catalog(), name)
    r = setting_of(info, parse(PatchModel, await read_json(request)))
    configuration = await engine.configure({name: r}, expected_version(if_match))
    tag(response, configuration)
    return _summary(info, configuration, engine)


def _place(facts: curves.Facts) -> dict[str, str]:
    return {"device": facts.device, "backend": facts.backend, "precision": facts.precision}


def _curve_row(row: curves.CurveRow) -> ModelCurveRow:
    assert row.line is not None and row.images_per_s is not None, "an engine knows its speeds"
    return ModelCurveRow(
        r=r_of(row.r),
        schedule=list(row.r),
        batch_s=BatchSeconds(a=row.line[0], b=row.line[1]),
        images_per_s=row.images_per_s,
        **row.model_dump(include={"tokens", "gflops", "agreement", "agreement_interval", "top1", "neighbours"}),
    )


def _summary(info: ModelInfo, configuration: Configuration, engine: Engine) -> ModelSummary:
    r = configuration.models.get(info.name)
    if r is None:
        raise NotFoundError(f"model {info.name} was unloaded meanwhile")
    return ModelSummary(
        name=info.name,
        architecture=info.architecture,
        source=info.source,
        version=info.version,
        is_default=info.name == next(iter(engine.catalog()), None),
        r="auto" if isinstance(r, AutoR) else r,
        auto=AutoBounds(**asdict(r)) if isinstance(r, AutoR) else None,
        config_version=configuration.version,
    )


async def _detail(
    info: ModelInfo, configuration: Configuration, engine: Engine, request: Request, response: Response
) -> ModelDetail:
    tag(response, configuration)
    compiling = await engine.compiling(info.name)
    return ModelDetail(
        id=info.name,
        **_summary(info, configuration, engine).model_dump(),
        backend=Backend(**asdict(info.backend)) if info.backend else None,
        compiling=compiling and Compiling(r=r_of(compiling.schedule), done=compiling.done, total=compiling.total),
        num_classes=len(info.labels),
        classes=list(info.labels),
        function_to_apply=info.activation,
        num_features=info.num_features,
        input_size=info.preprocessing.input_size,
        num_blocks=info.num_blocks,
        num_tokens=info.num_tokens,
        num_prefix_tokens=info.num_prefix_tokens,
        min_r=0,
        max_r=info.max_r,
        token_counts=_token_counts(info),
        tuned=list(info.tuned),
        ready=not request.app.state.is_draining,
    )


@functools.lru_cache(64)  # models come and go
def _token_counts(info: ModelInfo) -> dict[int, list[int]]:
    return {r: list(info.token_counts(info.schedule(r))) for r in range(info.max_r + 1)}
