"""The fast path to the busiest endpoints: FastAPI's own path takes as long as such an endpoint.

A direct endpoint is registered with FastAPI like any other, and is part of the API's description. But requests for its
exact path skip routing, dependencies and their exit stacks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.access import Service

Handlers = dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]]
"""Error handlers by class."""


class Endpoint(Protocol):
    """A direct endpoint."""

    async def __call__(self, request: Request, service: Service) -> Response: ...


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and an access dependency, and makes its own response."""

    def direct(self) -> tuple[Endpoint, Callable[[Request], Awaitable[Service]]]:
        """The endpoint, and the dependency that checks access and returns the service."""
        parts = self.dependant
        (access,) = parts.dependencies
        assert (parts.request_param_name, access.name, self.methods) == ("request", "service", {"POST"}), self.path
        assert parts.call is not None and access.call is not None
        return parts.call, access.call


class Direct:
    """Answers requests for direct routes, and passes all others to the application.

    Args:
        app: The application.
        routers: The routers; the first route of a path counts.
        handlers: Error handlers by class. Other errors propagate.
    """

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter], handlers: Handlers) -> None:
        self._app, self._handlers = app, handlers
        first: dict[str, Any] = {}
        for router in routers:
            for route in router.routes:
                first.setdefault(getattr(route, "path", ""), route)
        self._routes = {
            path: (route, *route.direct()) for path, route in first.items() if isinstance(route, DirectRoute)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            return await self._app(scope, receive, send)
        scope["route"], endpoint, access = found  # as FastAPI's routing does
        request = Request(scope, receive)
        try:
            response = await endpoint(request, await access(request))
        except Exception as error:
            handler = next((self._handlers[kind] for kind in type(error).__mro__ if kind in self._handlers), None)
            if handler is None:
                raise
            response = await handler(request, error)
        await response(scope, receive, send)
