"""The service on Ray Serve: every replica is one process with the application and the engine.

`build` makes Ray's application from settings, for `serve run`, `serve deploy` and their config files. The deployment's
`r` comes from `user_config`, which Ray sends to all replicas while they serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.app import create_app
from server.api.body import parse
from server.api.config import setting_of
from server.api.schemas import PatchConfig, PatchModel
from server.caches import keep_caches_in
from server.config.pushed import PushedConfig
from server.config.shared import Check
from server.config.store import ConfigStore, open_store
from server.dial import RSetting
from server.errors import InvalidError, SettingsError, shown
from server.metrics import ENGINE_STARTS, ENGINE_UP
from server.settings import Settings
from server.settings_sources import load_settings
from server.tracing.start import start_tracing
from server.types import ModelInfo, find_model
from tome_core import quiet  # noqa: F401  # the replica reports to nobody

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)

NAME = "tome"
"""The deployment's name in config files."""

_OF_RAY = {"host", "port", "http_workers", "drain_delay_s"}


def build(args: dict[str, Any]) -> Application:
    """The application for Ray Serve.

    Args:
        args: Settings by name, as in the YAML file of `tome-server serve`; they override TOME_* variables.

    Raises:
        SettingsError: A setting is unknown, out of range, or decided by Ray.
    """
    if theirs := sorted(_OF_RAY & args.keys()):
        raise SettingsError(f"Ray Serve decides about {', '.join(theirs)}: see its http_options and num_replicas")
    settings = load_settings(args)
    if len(settings.devices()) > 1:
        raise SettingsError(f"device is {settings.device!r}; a replica has one, and num_replicas makes more of them")
    if settings.grpc_port is not None:
        raise SettingsError("grpc_port goes with 'tome-server serve'; a replica of Ray Serve has no port of its own")
    from ray import serve  # heavy, so only after the settings are checked

    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        # Admission refuses excess requests at once and says when to retry. With fewer places here, requests would wait
        # in Ray's proxy, which keeps no deadline.
        max_ongoing_requests=2 * settings.max_queue_size,
        graceful_shutdown_timeout_s=settings.deadline_s + 5,
    )
    return deployment.bind(settings)


class Replica:
    """One replica, as Ray Serve calls it.

    Args:
        settings: From `build`.

    Raises:
        SettingsError, InvalidError, EngineError: See `build_engine`. Ray shows the error as the deployment's status.
    """

    def __init__(self, settings: Settings) -> None:
        from server.device.torch_backend import set_threads
        from server.engine_process import build_engine  # imports torch, so not where `build` runs

        _log_as_serve_does(settings.log_level)
        keep_caches_in(settings.state_dir)
        self._settings = settings.model_copy(update={"threads": settings.threads or _assigned_cpus()})
        set_threads(self._settings.threads)
        self._config: PushedConfig | None = None
        self._tracing, following = start_tracing("replica"), start_tracing("replica", follows=True)
        self._all_tracing = [each for each in (self._tracing, following) if each is not None]
        self._engine = build_engine(self._settings, self._open_config, following, changes_models=False)
        self._has_served = False

    def _open_config(self, settings: Settings, check: Check) -> ConfigStore:
        """The configuration of all replicas: `user_config`, or the source that the settings name."""
        if settings.shared_config is not None:
            return open_store(settings, check)
        start = {spec.name: spec.r or 0 for spec in settings.specs()}
        self._config = PushedConfig(start, "Ray's user_config", None, check)
        return self._config

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Without an access log, because Ray has its own.
        app = create_app(self._settings, self._engine, self._lifespan, instead=[_instead], tracing=self._tracing)
        app.add_middleware(_NamedByRay)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        from server.ray_metrics import export_forever

        self._engine.start()
        ENGINE_STARTS.inc()
        ENGINE_UP.labels("0").set(1)
        exporting = asyncio.create_task(export_forever(), name="metrics to Ray")
        yield  # until Ray has seen the last answer leave
        exporting.cancel()
        app.state.service.decoders.close()
        await self._engine.close()
        for tracing in self._all_tracing:
            tracing.close()

    async def check_health(self) -> None:
        """Raises if the batch loop does not answer. After some failures Ray replaces the replica."""
        await self._engine.check()
        self._has_served = True

    async def reconfigure(self, user_config: Any) -> None:
        """Takes the deployment's `r` from `user_config`, for the next request.

        Ray stops a replica whose `reconfigure` raises and starts others, which fail alike. So a replica that has served
        keeps its `r`, and reports the error in its log and by `tome_config_refused`. A replica that is starting raises.

        Raises:
            InvalidError, NotFoundError: `user_config` is wrong, and this replica has not served yet.
        """
        try:
            models = read_user_config(user_config, self._engine.catalog())
            if self._config is not None:
                self._config.take_over(models)
            elif models:
                raise InvalidError("shared_config sets r; user_config must not name it")
        except Exception as error:  # ServerError, and unexpected errors
            if not self._has_served:
                raise
            if self._config is not None:
                self._config.refuse(error)
            else:
                logger.error("user_config is refused: %s", error)


def read_user_config(user_config: Any, catalog: Mapping[str, ModelInfo]) -> dict[str, RSetting]:
    """The `r` of the models that `user_config` names.

    Args:
        user_config: The body of `PATCH /v1/models/{name}`, for the default model, and `models` of `PATCH /v1/config`.
        catalog: The loaded models, the default first.

    Raises:
        InvalidError: It has another form, or a model cannot merge by its `r`.
        NotFoundError: It names a model that is not served.
    """
    if not isinstance(user_config, dict):
        raise InvalidError(f"user_config is {shown(user_config)}; it must be a mapping like {{r: 8}}")
    said = {key if isinstance(key, str) else shown(key): value for key, value in user_config.items()}
    changes = parse(PatchConfig, {"models": said.pop("models", {})}).models
    if said:
        changes = {find_model(catalog, None).name: parse(PatchModel, said), **changes}
    return {name: setting_of(find_model(catalog, name), change) for name, change in changes.items()}


_instead = APIRouter(include_in_schema=False)
"""Endpoints that would describe one arbitrary replica as if it were all of them."""


@_instead.get("/metrics")
async def get_metrics() -> None:
    raise HTTPException(404, "the metrics of all replicas are among Ray's own, as ray_tome_*")


class _NamedByRay:
    """Leaves x-request-id to Ray's proxy, which sets the same id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def nameless(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, nameless)


def _assigned_cpus() -> int:
    """CPU threads that this replica may use: its `num_cpus`, at least one."""
    import ray

    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def _log_as_serve_does(level: str) -> None:
    """Sends our log lines to the handlers of Serve's own log of this replica: its log file, and standard error."""
    ours = logging.getLogger("server")
    ours.setLevel(level.upper())
    ours.handlers[:] = logging.getLogger("ray.serve").handlers
    ours.propagate = False
