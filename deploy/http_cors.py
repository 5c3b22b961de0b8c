"""Cross-origin requests from browsers: only from the origins that were configured."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = "GET, HEAD, POST"
_EXPOSED = "Retry-After, retry-after-ms, x-request-id"
_MAX_AGE_S = "600"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2048}")


class Cors:
    """ASGI middleware. Answers preflights of allowed origins, before API keys are asked for.

    What other origins send is answered as if this were not here: their browser keeps the answer.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Headers(scope=scope)
        origin = request.get("origin")
        allowed = origin is not None and ("*" in self._origins or origin in self._origins)
        if allowed and origin is not None and _is_preflight(scope, request):
            response = Response(status_code=204, headers=_preflight_headers(request))
            self._allow(response.headers, origin)
            await response(scope, receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if allowed and origin is not None:
                    self._allow(headers, origin)
                    headers["Access-Control-Expose-Headers"] = _EXPOSED
                else:
                    headers.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, named)

    def _allow(self, headers: MutableHeaders, origin: str) -> None:
        if "*" in self._origins:
            headers["Access-Control-Allow-Origin"] = "*"
            return
        headers["Access-Control-Allow-Origin"] = origin
        headers.add_vary_header("Origin")


def _is_preflight(scope: Scope, request: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in request


def _preflight_headers(request: Headers) -> dict[str, str]:
    headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": _MAX_AGE_S}
    wanted = request.get("access-control-request-headers", "")
    # A wildcard would leave out Authorization, so the names go back as they came.
    if _HEADER_NAMES.fullmatch(wanted):
        headers["Access-Control-Allow-Headers"] = wanted
    return headers
