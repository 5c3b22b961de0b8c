"""Serve's proxy answers with whatever `x-request-id` it was sent: here it is checked first."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.request_record import sane_id


class SaneRequestId:
    """Takes ids away that `sane_id` refuses; Serve then makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            given = Headers(scope=scope).get("x-request-id")
            if given is not None and sane_id(given) is None:
                del MutableHeaders(scope=scope)["x-request-id"]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Named to Serve by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(SaneRequestId)]
