"""Clients that leave while their request comes in, behind a proxy that says so by errors."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class LostClients:
    """ASGI middleware: `receive` that raises one of `errors` means that the client is gone.

    Serve's proxy cancels the call that fetches a request's body when its client leaves.
    """

    def __init__(self, app: ASGIApp, errors: tuple[type[Exception], ...]) -> None:
        self._app = app
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = False

        async def heard() -> Message:
            nonlocal gone
            if not gone:
                try:
                    return await receive()
                except self._errors:
                    gone = True  # nothing comes any more: asking again would wait for ever
            return {"type": "http.disconnect"}

        await self._app(scope, heard if scope["type"] == "http" else receive, send)
