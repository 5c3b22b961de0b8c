"""Around every HTTP request: its id, its record, and the end of both."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.metrics import Metrics
from deploy.request_record import RequestRecord, begin, finish, new_id, sane_id
from deploy.trace_options import PARENT_HEADERS

if TYPE_CHECKING:
    from deploy.tracing import Tracing

OTHER = "other"
"""The route of every path that is none of ours."""


class RequestScope:
    """Gives each request an id, echoes it as `x-request-id`, counts and logs the request.

    Without `echoes` whoever stands in front echoes the id that the client has sent.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: Router,
        echoes: bool,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._tracing = tracing
        self._metrics = metrics
        self._routes = routes
        self._echoes = echoes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id")
        request_id = sane_id(given) or new_id()
        record = RequestRecord(request_id=request_id, route=self._route(scope))
        if self._tracing is not None:
            parent = {name: headers.getlist(name) for name in PARENT_HEADERS}
            record.trace = self._tracing.begin(record, parent)
        begin(self._metrics, record)
        echoes = self._echoes or request_id != given

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if echoes:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            record.client_gone = True
        except asyncio.CancelledError:
            record.client_gone = True  # Serve cancels what nobody waits for
            raise
        except Exception:
            record.status = 500
            raise
        finally:
            finish(self._metrics, record)

    def _route(self, scope: Scope) -> str:
        """The path of one of our routes as it is declared: a client's words are no label."""
        for route in self._routes.routes:
            if route.matches(scope)[0] is not Match.NONE:
                return str(getattr(route, "path", OTHER))
        return OTHER
