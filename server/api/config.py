"""The live configuration over HTTP: all models at once, and the checks that a change of one model shares."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from server.api.access import ERRORS, ForAdmins, ForUsers
from server.api.body import parse
from server.api.json_body import read_json
from server.api.schemas import Config, DeployedR, PatchConfig, PatchModel
from server.dial import AutoR, RSetting, parse_setting, r_of
from server.errors import InvalidError, shown
from server.types import Configuration, ModelInfo, find_model

router = APIRouter(prefix="/v1/config", responses=ERRORS)

_ETAG = re.compile(r'"?([0-9]{1,18})"?')
IfMatch = Annotated[
    str | None,
    Header(
        description='The ETag of an answer, like "3"; or * for any.',
        json_schema_extra={"pattern": rf"^(\*|{_ETAG.pattern})$"},
    ),
]
_EXAMPLE = {"models": {"tome-vit-tiny-64": {"r": 13}}}
_PATCH_BODY = {
    "required": True,
    "content": {"application/json": {"schema": PatchConfig.model_json_schema(), "example": _EXAMPLE}},
}


@router.get("", response_model_exclude_none=True)
async def get_config(response: Response, service: ForUsers) -> Config:
    """Each model's deployment r, as PATCH takes it."""
    return _config(await service.engine.configuration(), response)


@router.patch("", response_model_exclude_none=True, openapi_extra={"requestBody": _PATCH_BODY})
async def patch_config(request: Request, response: Response, service: ForAdmins, if_match: IfMatch = None) -> Config:
    """Changes the r of several models at once, all or none; If-Match guards against a race."""
    said = parse(PatchConfig, await read_json(request))
    catalog = service.engine.catalog()
    changes = {name: setting_of(find_model(catalog, name), change) for name, change in said.models.items()}
    return _config(await service.engine.configure(changes, expected_version(if_match)), response)


def setting_of(info: ModelInfo, change: PatchModel) -> RSetting:
    """Checks a change and returns its setting. Raises InvalidError if the model cannot merge so."""
    r = parse_setting(change.r, change.max_r, change.min_agreement)
    if not isinstance(r, AutoR):
        return r_of(info.schedule(r, change.inflect))
    if change.inflect is not None:
        raise InvalidError("inflect goes with a single r, not with auto")
    return r


def expected_version(if_match: str | None) -> int | None:
    """The version that an If-Match header requires; None for any."""
    if if_match is None or if_match == "*":
        return None
    etag = _ETAG.fullmatch(if_match)
    if etag is None:
        raise InvalidError(f'If-Match is {shown(if_match)}; send the ETag of an answer, like "3"')
    return int(etag[1])


def tag(response: Response, configuration: Configuration) -> None:
    """Sets the ETag to the version, which a later change may require."""
    response.headers["etag"] = f'"{configuration.version}"'


def _config(configuration: Configuration, response: Response) -> Config:
    tag(response, configuration)
    return Config(
        config_version=configuration.version,
        models={name: _deployed(r) for name, r in configuration.models.items()},
    )


def _deployed(r: RSetting) -> DeployedR:
    if isinstance(r, AutoR):
        return DeployedR(r="auto", max_r=r.max_r, min_agreement=r.min_agreement)
    return DeployedR(r=r, max_r=None, min_agreement=None)
