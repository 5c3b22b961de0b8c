"""An endpoint that only streams: recorded events, one every `gap_s` seconds."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

EVENTS = Path(tempfile.gettempdir()) / f"conclave-events-{os.getuid()}"
"""What is streamed; every server reads it once."""


def make_app() -> FastAPI:
    """The ASGI application."""
    app = FastAPI()
    recorded: list[bytes] = []

    @app.get("/ready")
    async def ready() -> Response:
        return Response()

    @app.post("/")
    async def stream(request: Request) -> Response:
        body = await request.json()
        if not recorded:
            recorded.extend(part + b"\n\n" for part in EVENTS.read_bytes().split(b"\n\n")[:-1])
        return StreamingResponse(_paced(body["gap_s"]), media_type="text/event-stream")

    async def _paced(gap_s: float) -> AsyncIterator[bytes]:
        for event in recorded:
            await asyncio.sleep(gap_s)
            yield event

    return app


def bare_deployment(max_requests: int) -> Any:
    """The same behind Ray Serve."""
    from ray import serve

    @serve.deployment(
        name="Bare",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=max_requests,
        max_queued_requests=-1,
    )
    @serve.ingress(make_app)
    class Bare:
        pass

    return Bare


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(make_app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
