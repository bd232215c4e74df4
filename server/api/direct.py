"""The short way to the endpoints that are asked most: FastAPI's own to an endpoint costs as much as one of ours does.

A direct endpoint is described to FastAPI like any other, and stands in the API's description. But what is asked of its
very path goes to it without routing, dependencies and their exit stacks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.access import Service

Handlers = dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]]
"""How errors are answered, by class."""


class Endpoint(Protocol):
    """A direct endpoint."""

    async def __call__(self, request: Request, service: Service) -> Response: ...


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and a service for those who may ask, and makes its own response."""

    def direct(self) -> tuple[Endpoint, Callable[[Request], Awaitable[Service]]]:
        """The endpoint, and what gives the service to those who may ask."""
        parts = self.dependant
        (access,) = parts.dependencies
        assert (parts.request_param_name, access.name, self.methods) == ("request", "service", {"POST"}), self.path
        assert parts.call is not None and access.call is not None
        return parts.call, access.call


class Direct:
    """Answers what is asked of direct routes, and leaves all else to the application.

    Args:
        app: The application.
        routers: Where routes are; the first one of a path counts.
        handlers: How errors are answered. Others go on to the application's surroundings.
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
