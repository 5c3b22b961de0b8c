"""Who may ask, and from which pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deploy.config import ConfigError, parse_args
from deploy.http_options import HttpOptions
from tests.deploy.http_client import client_of, is_openai_error

MakeApi = Callable[..., Any]
PAGE = "https://page.example"
OTHER = "https://other.example"


def options(*origins: str) -> HttpOptions:
    return HttpOptions(cors_origins=origins)


def preflight(origin: str) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/nano-jamba"),
        ("GET", "/v1/experts"),
        ("GET", "/version"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("GET", "/v1/../health/x"),
        ("HEAD", "/v1/models"),
        ("OPTIONS", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/classify"),
        ("POST", "/classify"),
        ("POST", "/nothing/of/ours"),
        ("TRACE", "/v1/models"),
    ],
)
async def test_every_route_needs_a_key(make_api: MakeApi, method: str, path: str) -> None:
    async with client_of(make_api().app(("k1", "k2"))) as client:
        for given in (None, "Bearer k3", "Bearer", "Bearer ", "k1", "Basic k1", "Bearer k1 k2"):
            headers = {} if given is None else {"Authorization": given}
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401, (given, response.text)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert is_openai_error(response.json())
        for given in ("Bearer k2", "bearer k1"):
            response = await client.request(method, path, headers={"Authorization": given})
            assert response.status_code != 401


async def test_health_checks_need_none(make_api: MakeApi) -> None:
    async with client_of(make_api().app(("k",))) as client:
        for path in ("/health", "/ready"):
            for method in ("GET", "HEAD"):
                assert (await client.request(method, path)).status_code == 200


async def test_other_pages_get_nothing_by_default(make_api: MakeApi) -> None:
    async with client_of(make_api().app()) as client:
        for response in (
            await client.get("/v1/models", headers={"Origin": PAGE}),
            await client.options("/v1/completions", headers=preflight(PAGE)),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]
        assert response.status_code == 405


@pytest.mark.parametrize("keys", [(), ("k",)])
async def test_preflight_of_an_allowed_page(make_api: MakeApi, keys: tuple[str, ...]) -> None:
    async with client_of(make_api().app(keys, options=options(PAGE, "http://a:8"))) as client:
        response = await client.options("/v1/chat/completions", headers=preflight(PAGE))
        assert response.status_code == 204
        assert response.content == b""
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "POST" in response.headers["access-control-allow-methods"]
        allowed = response.headers["access-control-allow-headers"]
        assert allowed == preflight(PAGE)["Access-Control-Request-Headers"]
        assert response.headers["vary"] == "Origin"
        refused = await client.options("/v1/chat/completions", headers=preflight(OTHER))
        assert refused.status_code == (401 if keys else 405)
        assert is_openai_error(refused.json())
        assert not [name for name in refused.headers if name.startswith("access-control")]


async def test_answers_to_allowed_pages(make_api: MakeApi) -> None:
    async with client_of(make_api().app(("k",), options=options(PAGE))) as client:
        for headers, status in (({"Authorization": "Bearer k"}, 200), ({}, 401)):
            mine = await client.get("/v1/models", headers={**headers, "Origin": PAGE})
            assert mine.status_code == status
            assert mine.headers["access-control-allow-origin"] == PAGE
            assert "Retry-After" in mine.headers["access-control-expose-headers"]
            other = await client.get("/v1/models", headers={**headers, "Origin": OTHER})
            assert other.status_code == status
            assert "access-control-allow-origin" not in other.headers
            assert mine.headers["vary"] == other.headers["vary"] == "Origin"
    async with client_of(make_api().app(options=options("*"))) as client:
        response = await client.get("/v1/models", headers={"Origin": OTHER})
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("origin", ["", "example.org", "https://a.b/", "https://a.b/c", "null"])
def test_origins_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origin"):
        parse_args({"model": "m", "cors_origin": [origin]})


def test_limits_are_options() -> None:
    args = parse_args(
        {
            "model": "m",
            "max_request_bytes": "2MiB",
            "body_timeout": "5",
            "request_timeout": "60",
            "cors_origin": PAGE,
        }
    )
    assert args.http == HttpOptions(
        max_request_bytes=2**21, body_timeout_s=5.0, request_timeout_s=60.0, cors_origins=(PAGE,)
    )
    assert parse_args({"model": "m"}).http == HttpOptions()
    for wrong in ({"max_request_bytes": 0}, {"body_timeout": 0}, {"request_timeout": "-1"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            parse_args({"model": "m", **wrong})
