"""The settings of the service: one frozen object, made once.

Every field is a flag (`--max-batch-size`), a variable (`TOME_MAX_BATCH_SIZE`) and a key of a YAML file.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from server.dial import MOST_MAX_R, AutoR, RSetting
from server.errors import NotFoundError, SettingsError, shown
from server.keys import KEYS, checked_key, read_key
from server.model_spec import BUNDLED_NAME, AtHome, ModelSpec, R
from server.versions import models_in

Protocol = Literal["oip", "embeddings", "huggingface", "torchserve", "kserve", "sagemaker", "vertex"]
DEFAULT_PROTOCOLS: tuple[Protocol, ...] = ("oip", "embeddings", "huggingface", "torchserve", "kserve")


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")
Route = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~:-]+)+$")]
Key = Annotated[str | None, BeforeValidator(checked_key)]


def _path_at_home(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


class Settings(BaseModel):
    """The settings of `tome-server serve`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field(
        "127.0.0.1", description="address or name to listen on; 0.0.0.0 for every interface, :: with IPv6"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model: tuple[ModelSpec, ...] = Field(
        (ModelSpec(source="bundled", name=BUNDLED_NAME),),
        description="a model to serve, SOURCE[,weights=FILE][,tuned=FILE][,name=NAME][,r=R][,version=N] with SOURCE "
        "one of bundled, a timm name, hf-hub:ORG/NAME, local-dir:FOLDER; repeat it for more models, the first is the "
        "default",
    )
    model_repository: Annotated[Path | None, BeforeValidator(_path_at_home)] = Field(
        None,
        description="folder of model folders that POST /v2/repository/models/NAME/load may load while the server runs; "
        "default: only the models of --model",
    )
    weights: AtHome | None = Field(
        None, description="safetensors file for the one --model; 'random' for untrained weights"
    )
    tuned: AtHome = Field(
        "auto",
        min_length=1,
        description="tuned numbers from 'tome-server tune': auto takes those beside the weights or in the state "
        "folder, none takes none, a FILE is for the one --model",
    )
    r: R = Field(
        0, description="tokens merged in each block if a request names no r: a number, a list like 16,14,12, or auto"
    )
    max_r: int | None = Field(None, ge=0, le=MOST_MAX_R, description="with r auto: the most tokens to merge in a block")
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="with r auto: the least expected share of answers equal to those at r=0"
    )
    state_dir: Path | None = Field(
        Path("~/.local/state/tome-server"),
        description="folder for live changes, compiled models, curves and tuned numbers; none keeps nothing",
    )
    shared_config: str | None = Field(
        None,
        min_length=1,
        repr=False,
        description="where servers share the live r: redis://HOST[:PORT][/DATABASE], or a YAML file to follow",
    )
    http_workers: int = Field(1, ge=1, le=64, description="HTTP processes, which parse and decode; more use more cores")
    device: str = Field(
        "auto",
        description="torch device; auto takes cuda if available, otherwise the CPU; several, as in cuda:0,cuda:1, get "
        "an engine process each, and the least loaded gets the next image",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="auto: bf16 on cuda; on the CPU fp32, or bf16 if OpenVINO measures it to be faster; fp8, which "
        "auto never takes: the fastest on Hopper GPUs and newer, because most products of the blocks use weights "
        "and activations in e4m3; a small model then changes its answer for a few percent of images; r works as usual, "
        "and calibrate measures fp8 separately",
    )
    backend: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="runtime; auto: OpenVINO on the CPU, if it is installed and supports the model"
    )
    decode: Literal["auto", "cpu", "device"] = Field(
        "auto",
        description="where JPEG is decoded: in the HTTP processes (cpu), or by the engine on its device, in batches; "
        "auto: by the engine on cuda",
    )
    threads: int = Field(0, ge=0, le=4096, description="CPU threads of an engine; 0: all CPUs of the container")
    max_batch_size: int = Field(
        32, ge=1, le=4096, description="most images in a batch; a larger batch has more throughput, but more latency"
    )
    batch_timeout_s: float = Field(
        0.1, gt=0, description="age in seconds at which a waiting image goes before fuller batches"
    )
    max_queue_size: int = Field(256, ge=1, description="most images in flight; more get 429")
    deadline_s: float = Field(
        30.0, gt=0, le=3600, description="longest time of a request, in seconds; its deadline_ms may be shorter"
    )
    client_timeout_s: int = Field(
        10, ge=1, le=3600, description="longest silence of a client in seconds, before or within a request"
    )
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        le=3600,
        description="seconds after SIGTERM in which /readyz is 503 and all else is served, before the port closes",
    )
    max_body_bytes: int = Field(
        32 << 20, ge=1, description="largest request body; an HTTP process holds at most eight of them at once"
    )
    max_image_pixels: int = Field(50_000_000, ge=1, le=89_000_000, description="largest image, width x height")
    max_images: int = Field(32, ge=1, description="most images in one request")
    drift_sample: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the images with r above 0 that an idle device computes again at r=0, to compare the "
        "agreement with the curve's; 0 for none",
    )
    api_key: Key = Field(None, repr=False, description="key of all requests; default: none")
    api_key_file: Path | None = Field(None, description="file that contains only the API key")
    admin_key: Key = Field(None, repr=False, description="key of changes; default: none")
    admin_key_file: Path | None = Field(None, description="file that contains only the admin key")
    metrics_key: Key = Field(
        None,
        repr=False,
        description="key of GET /metrics, which the other keys open too; default: none",
    )
    metrics_key_file: Path | None = Field(None, description="file that contains only the metrics key")
    cors_origin: tuple[str, ...] = Field(
        (),
        description="an origin whose pages may call this server from a browser, like https://app.example.org; repeat "
        "it for more; * for all; default: only this server's own page",
    )
    protocol: tuple[Protocol, ...] = Field(
        DEFAULT_PROTOCOLS,
        description="protocols besides our own API, separated by blanks or commas, or none: oip (Open Inference "
        "Protocol v2), embeddings (OpenAI), huggingface, torchserve, kserve (v1), sagemaker, vertex",
    )
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="port of the Open Inference Protocol over gRPC; default: none"
    )
    vertex_predict_route: Route = Field(
        "/predict",
        description="path of Vertex AI's predictions; if its protocol is on, AIP_PREDICT_ROUTE also sets it",
    )
    vertex_health_route: Route = Field(
        "/health", description="path of Vertex AI's health; if its protocol is on, AIP_HEALTH_ROUTE also sets it"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = Field(
        "text", description="log lines as text, or as JSON with the ids of request and trace"
    )
    access_log: bool = Field(True, description="a log line for each request at level info; for probes at level debug")

    @model_validator(mode="before")
    @classmethod
    def _read_key_files(cls, said: dict[str, Any]) -> dict[str, Any]:
        for key in KEYS:
            name = f"{key}_file"
            if name not in said:
                continue
            if key in said:
                raise ValueError(f"{key} and {name} are both given; give one of them")
            try:
                said = {**said, key: read_key(said[name])}
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return said

    @field_validator("state_dir", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("device")
    @classmethod
    def _several_devices(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if "" in names or (len(names) > 1 and "auto" in names):
            raise ValueError("it must be auto, a device, or several with a comma between, as in cuda:0,cuda:1")
        return ",".join(names)

    @field_validator("model", mode="before")
    @classmethod
    def _several_models(cls, value: Any) -> Any:
        """Models, separated by blanks; a path with a blank is quoted, as for a shell."""
        models = shlex.split(value) if isinstance(value, str) else value
        if not models:
            raise ValueError("it must name at least one model")
        return models

    @field_validator("protocol", mode="before")
    @classmethod
    def _several_protocols(cls, value: Any) -> Any:
        names = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else value
        return () if names in ("", [""], ["none"], ("none",)) else names

    @field_validator("cors_origin", mode="before")
    @classmethod
    def _several_origins(cls, value: Any) -> Any:
        return value.split() if isinstance(value, str) else value

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        origins = tuple(origin.lower() for origin in value)
        if wrong := [origin for origin in origins if not _ORIGIN.fullmatch(origin)]:
            raise ValueError(f"{shown(wrong[0])} is not an origin; write SCHEME://HOST[:PORT] without a path, or *")
        return origins

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [spec.name for spec in self.model]
        if len(set(names)) < len(names):
            raise ValueError(f"two models are named alike ({', '.join(names)}); give one a name=")
        bounded = self.max_r is not None or self.min_agreement is not None
        if bounded and not any(isinstance(r, AutoR) for r in (self.r, *(spec.r for spec in self.model))):
            raise ValueError("--max-r and --min-agreement go with --r auto")
        if self.weights and (len(self.model) > 1 or self.model[0].weights):
            raise ValueError(
                "--weights is for one --model that names none itself; for several write SOURCE,weights=FILE"
            )
        if self.tuned not in ("auto", "none") and (len(self.model) > 1 or self.model[0].tuned):
            raise ValueError(
                "--tuned FILE is for one --model that names none itself; for several write SOURCE,tuned=FILE"
            )
        return self

    def devices(self) -> tuple[str, ...]:
        """The devices; each gets an engine process."""
        return tuple(self.device.split(","))

    def state_file(self) -> Path | None:
        """The file of live changes: one file for each port, so that two servers of a machine do not share it.

        All servers on port 0 share one file, and so their live `r`.
        """
        return self._state_folder(self.state_dir) / f"config-{self.port}.json" if self.state_dir else None

    def models_file(self) -> Path | None:
        """The file of loaded and unloaded models: one file for each port, like `state_file`."""
        return self._state_folder(self.state_dir) / f"models-{self.port}.json" if self.state_dir else None

    def cache_dir(self) -> Path | None:
        """The folder of compiled models, which outlives a restart."""
        return self._state_folder(self.state_dir) / "openvino" if self.state_dir else None

    @staticmethod
    def _state_folder(state_dir: Path) -> Path:
        """Raises SettingsError if the folder is in a home folder, and this user has none."""
        try:
            return state_dir.expanduser()
        except RuntimeError:
            raise SettingsError(
                f"state_dir: {state_dir} cannot be found, for this user has no home folder; name another, or none"
            ) from None

    def specs(self) -> tuple[ModelSpec, ...]:
        """The models to load, each in its version, with its own weights, tuned numbers and `r`.

        Raises:
            SettingsError: A named version does not exist.
        """
        return tuple(self.spec(spec.name).in_its_version() for spec in self.model)

    def spec(self, name: str) -> ModelSpec:
        """A model of `--model` or of the repository, with the settings that are common to all models.

        Raises:
            NotFoundError: Neither has this name.
        """
        for spec in self.model:
            if spec.name == name:
                told = {"weights": spec.weights or self.weights, "tuned": spec.tuned or self.tuned}
                return spec.model_copy(update=told | {"r": self._bounded(spec.r)})
        if self.model_repository is not None and name in models_in(self.model_repository):
            tuned = self.tuned if self.tuned in ("auto", "none") else "auto"  # a file is for one --model
            source = f"local-dir:{self.model_repository / name}"
            return ModelSpec(source=source, name=name, tuned=tuned, r=self._bounded(None))
        known = ", ".join(self.known_models())
        raise NotFoundError(
            f"there is no model {shown(name)} to load; there are: {known}. --model and --model-repository name them"
        )

    def known_models(self) -> list[str]:
        """The models that may be loaded by name: those of `--model`, then those of the repository."""
        repository = [] if self.model_repository is None else models_in(self.model_repository)
        return list(dict.fromkeys([*(spec.name for spec in self.model), *repository]))

    def _bounded(self, r: RSetting | None) -> RSetting:
        """A model's own `r`, or the common one; `auto` gets the common bounds."""
        r = self.r if r is None else r
        return AutoR(self.max_r, self.min_agreement) if isinstance(r, AutoR) else r
