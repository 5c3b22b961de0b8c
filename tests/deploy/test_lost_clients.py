"""Clients that leave while their request is coming in, as Serve's proxy tells a replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import TaskCancelledError

from deploy.http_api import build_api

MakeApi = Callable[..., Any]
WHOLE = {"type": "http.request", "body": b'{"prompt": [5], "max_tokens": 200}', "more_body": False}
BEGUN = {"type": "http.request", "body": b'{"prompt": [5', "more_body": True}


class LeavingClient:
    """One POST, of which `messages` still come: then the proxy's call is cancelled, once."""

    def __init__(self, *messages: Any) -> None:
        self.coming: list[Any] = [*messages, TaskCancelledError()]
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        if not self.coming:
            await asyncio.Event().wait()
        await asyncio.sleep(0.02)
        message = self.coming.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("messages", [(), (BEGUN,), (BEGUN, BEGUN), (WHOLE,)])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_they_are_counted_as_gone(
    make_api: MakeApi, path: str, messages: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    if path == "/tokenize" and WHOLE in messages:
        return  # answered before its client leaves
    api = make_api(ids=[70] * 200, delay=0.02)
    app = build_api(api.service, behind_serve=True, lost_client=(TaskCancelledError,))
    client = LeavingClient(*messages)
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    with caplog.at_level(logging.WARNING):
        async with asyncio.timeout(10):
            await app(scope, client.receive, client.send)
    metrics = api.service.metrics.text().decode()
    assert f'requests_total{{replica_id="r1",route="{path}",status="499"}} 1.0' in metrics
    assert not caplog.records
    async with asyncio.timeout(10):
        while not all(stream.aborted for stream in api.client.streams):
            await asyncio.sleep(0.01)
    assert api.service._admission.live == 0
