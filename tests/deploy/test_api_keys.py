"""Keys from the environment: of every way to build the application."""

from __future__ import annotations

import pytest

from deploy.api_keys import VARIABLE, with_environment_key
from deploy.app import build


def test_the_application_takes_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(**options: object) -> tuple[str, ...]:
        application = build({"model": "nano-jamba", **options})
        resolved = application._bound_deployment.init_args[0]
        found: tuple[str, ...] = resolved.api_keys
        return found

    assert keys() == ()
    monkeypatch.setenv(VARIABLE, "from-the-secret")
    assert keys() == ("from-the-secret",)
    assert keys(api_key=["given"]) == ("given",)


def test_an_empty_key_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert with_environment_key({"model": "m"}) == {"model": "m"}
