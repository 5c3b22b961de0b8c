"""Calls to the HTTP application in process."""

from __future__ import annotations

import json
from typing import Any

import httpx


def client_of(app: Any) -> httpx.AsyncClient:
    """A client whose requests reach `app` without a socket."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def post(api: Any, path: str, body: Any) -> httpx.Response:
    """The answer of a fresh application; escapes what is no Unicode, as JSON can."""
    async with client_of(api.app()) as client:
        return await client.post(path, content=json.dumps(body))


def is_openai_error(body: Any) -> bool:
    """Whether it is an error object with all of its keys."""
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
