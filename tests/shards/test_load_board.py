"""The board in Ray's store: where a worker writes, when it does, and that nothing stays behind."""

from __future__ import annotations

import logging

import pytest
from ray.experimental import internal_kv

from shards.load_board import bytes_read, open_board, reporter


class Store:
    """What the cluster's store does, in a dict."""

    def __init__(self) -> None:
        self.held: dict[tuple[bytes, bytes], bytes] = {}
        self.broken = False

    def internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, space: bytes) -> int:
        self._check()
        assert overwrite
        self.held[space, key] = value
        return 1

    def internal_kv_get(self, key: bytes, space: bytes) -> bytes | None:
        self._check()
        return self.held.get((space, key))

    def internal_kv_exists(self, key: bytes, space: bytes) -> bool:
        return self.internal_kv_get(key, space) is not None

    def internal_kv_keys(self, prefix: bytes, space: bytes) -> list[bytes]:
        self._check()
        return [key for held, key in self.held if held == space and key.startswith(prefix)]

    def internal_kv_del(self, key: bytes, by_prefix: bool, space: bytes) -> int:
        assert by_prefix
        found = self.internal_kv_keys(key, space)
        for each in found:
            del self.held[space, each]
        return len(found)

    def _check(self) -> None:
        if self.broken:
            raise ConnectionError("the head node is gone")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(internal_kv, "global_gcs_client", store)
    return store


def test_workers_of_all_replicas_are_added_up_and_wiped(store: Store) -> None:
    assert reporter("conclave/app/r1/stage-0") is None
    with open_board("conclave/app"), open_board("conclave/app2"):
        assert bytes_read("conclave/app") == 0
        for place, count in (
            ("conclave/app/r1/stage-0", 5),
            ("conclave/app/r1/expert-0", 30),
            ("conclave/app/r2/stage-0", 200),
            ("conclave/app2/r1/stage-0", 1000),
        ):
            report = reporter(place)
            assert report is not None
            report(1)
            report(count)
        assert bytes_read("conclave/app") == 235
        # The successor of a dead worker begins again in its place.
        report = reporter("conclave/app/r2/stage-0")
        assert report is not None
        report(7)
        assert bytes_read("conclave/app") == 42
        assert bytes_read("conclave/app2") == 1000
    assert not store.held


def test_an_unreachable_store_stops_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.broken = True
    ran = False
    with caplog.at_level(logging.WARNING, "conclave"), open_board("conclave/app"):
        ran = True
    assert ran
    assert len(caplog.messages) == 2
    assert all("the head node is gone" in message for message in caplog.messages)
