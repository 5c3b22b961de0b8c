"""API keys: every route but the health checks, and unknown routes too."""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.http_replies import error_response
from deploy.openai_errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready"})


class ApiKeys:
    """ASGI middleware that refuses requests without one of the keys; health checks stay open."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        # Digests are equally long: a comparison's time says nothing about a key's length.
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._open(scope) or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "Incorrect API key provided: send one as `Authorization: Bearer KEY`.",
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        # Behind Serve the path still carries the application's route prefix.
        return scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS

    def _allowed(self, scope: Scope) -> bool:
        header = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, given = header.partition(b" ")
        digest = sha256(given.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)
