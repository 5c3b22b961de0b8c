"""Server-sent events on their way to one client: keep-alive comments, and an end when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.patient_stream import PatientStream

KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(Response):
    """Sends each event as it comes, and a comment when none has come for `keep_alive_s`.

    It is never ahead of its client by more than the connection's own buffers: what has not been
    sent stays with `events`. Raises ClientDisconnect when the client leaves. `source` is closed in
    any case, also when nobody has asked `events` for anything.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: PatientStream, keep_alive_s: float
    ) -> None:
        self._events = events
        self._source = source
        self._keep_alive_s = keep_alive_s
        # Long ago: a stream that has nothing to send yet begins with a comment.
        self._last_sent = -float("inf")
        self._sending = False
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client leaves first."""
        headers = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **headers})
            await self._send_all(receive, send)
        except OSError as error:
            raise ClientDisconnect from error
        finally:
            await self._source.aclose()

    async def _send_all(self, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        others = [
            asyncio.ensure_future(wait_for_disconnect(receive)),
            asyncio.ensure_future(self._keep_alive(send)),
        ]
        try:
            await asyncio.wait((writing, *others), return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ClientDisconnect
            writing.result()
        finally:
            for task in (writing, *others):
                task.cancel()
            await asyncio.gather(writing, *others, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        async with aclosing(self._events) as events:
            async for event in events:
                self._sending = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._sending = False
                self._last_sent = now()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        while True:
            if not self._sending and now() - self._last_sent >= self._keep_alive_s:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._last_sent = now()
            # What is being sent will have been sent at some later time: look again then.
            last = now() if self._sending else self._last_sent
            await asyncio.sleep(max(0.0, last + self._keep_alive_s - now()))


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        continue
