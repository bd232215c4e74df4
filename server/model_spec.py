"""One model to serve, from a flag or a YAML mapping: its source, weights, tuned numbers and `r`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.dial import AutoR, RSetting, parse_setting
from server.errors import InvalidError, SettingsError
from server.versions import find_version

BUNDLED_NAME = "tome-vit-tiny-64"


def _r(value: object) -> RSetting:
    try:
        return value if isinstance(value, AutoR) else parse_setting(value)
    except InvalidError as error:
        raise ValueError(error.message) from None


def _version(value: object) -> object:
    return str(value) if type(value) is int else value  # YAML gives an integer


def _source_at_home(source: str) -> str:
    kind, colon, folder = source.partition(":")
    return f"{kind}:{os.path.expanduser(folder)}" if kind == "local-dir" and colon else source


R = Annotated[RSetting, BeforeValidator(_r)]
AtHome = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with `~`, which a shell expands only at the beginning of a word."""


class ModelSpec(BaseModel):
    """One model to serve: `SOURCE[,weights=FILE][,tuned=FILE][,name=NAME][,r=R][,version=N]`, or a YAML mapping.

    SOURCE is `bundled`, a timm name, `hf-hub:ORG/NAME`, or `local-dir:FOLDER` (the Hugging Face layout). FOLDER and
    FILE may begin with `~`, and may contain blanks and commas: only a comma before `word=` ends them. `tuned` may also
    be `auto` or `none`. `version` names one of the numbered folders in FOLDER; without it, the newest is served.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, AfterValidator(_source_at_home)] = Field(min_length=1)
    weights: AtHome | None = None
    tuned: AtHome | None = Field(default=None, min_length=1)
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    r: R | None = None
    version: Annotated[str | None, BeforeValidator(_version)] = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            source, *pairs = re.split(r",(?=[a-z_]+=)", value)
            if "," in source and not source.startswith("local-dir:"):
                raise ValueError(
                    f"{value!r} must read SOURCE[,weights=FILE][,tuned=FILE][,name=NAME][,r=R][,version=N]"
                )
            value = {"source": source, **dict(pair.split("=", 1) for pair in pairs)}
        if isinstance(value, dict) and isinstance(value.get("source"), str) and not value.get("name"):
            value = {**value, "name": _default_name(value["source"])}
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.version is not None and not self.source.startswith("local-dir:"):
            raise ValueError(f"version goes with local-dir:FOLDER, not with {self.source}")
        return self

    def in_its_version(self) -> ModelSpec:
        """The same model in the folder of its version: the given version, or the newest.

        Raises:
            SettingsError: There is no such version.
        """
        kind, _, folder = self.source.partition(":")
        if kind != "local-dir" or not folder:
            return self
        try:
            found, version = find_version(Path(folder), self.version)
        except InvalidError as error:
            raise SettingsError(f"model {self.name}: {error}") from None
        return self.model_copy(update={"source": f"{kind}:{found}", "version": version})


def _default_name(source: str) -> str:
    if source == "bundled":
        return BUNDLED_NAME
    kind, _, folder = source.partition(":")
    if kind != "local-dir":
        return source.rpartition(":")[2].rsplit("/", 1)[-1].split("@")[0]
    name = os.path.basename(os.path.realpath(os.path.expanduser(folder)))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "model"
