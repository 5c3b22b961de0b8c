from __future__ import annotations

import dataclasses
import enum
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router import placement, step, step_trace
from router.codec import CodecError, decode, encode


def _messages(module: Any) -> list[type]:
    found = [getattr(module, name) for name in dir(module)]
    return [
        cls
        for cls in found
        if isinstance(cls, type)
        and dataclasses.is_dataclass(cls)
        and getattr(cls, "__module__", "") == module.__name__
    ]


MESSAGES = [*_messages(step), *_messages(step_trace), *_messages(placement)]
INT64 = st.integers(-(2**63), 2**63 - 1)
st.register_type_strategy(int, INT64)
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(str, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))


def test_the_wire_contract_is_covered() -> None:
    names = {cls.__name__ for cls in MESSAGES}
    assert {"Admit", "TokenBatch", "StepPlan", "StepResult", "RoutingTable"} <= names


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_round_trip(cls: type) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.from_type(cls))
    def check(message: Any) -> None:
        back = decode(cls, encode(message))
        assert type(back) is cls
        assert back == message
        assert hash(back) == hash(message)
        for field in dataclasses.fields(cls):
            want = getattr(message, field.name)
            if isinstance(want, enum.Enum):
                assert getattr(back, field.name) is want

    check()


def test_decodes_from_a_view_of_a_frame() -> None:
    data = b"head" + encode(step.Abort(seq_id=5, epoch=2))
    assert decode(step.Abort, memoryview(data)[4:]) == step.Abort(seq_id=5, epoch=2)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "Abort"),
        (b"\xc1", "Abort"),
        (encode(step.Abort(seq_id=1, epoch=1))[:-1], "Abort"),
        (encode(step.Abort(seq_id=1, epoch=1)) + b"\x00", "Abort"),
        (msgspec.msgpack.encode({"seq_id": 1}), "epoch"),
        (msgspec.msgpack.encode({"seq_id": "1", "epoch": 1}), "seq_id"),
        (msgspec.msgpack.encode({"seq_id": 1.5, "epoch": 1}), "seq_id"),
        (msgspec.msgpack.encode([1, 1]), "Abort"),
        (b"\xa2\xff\xfe", "Abort"),
    ],
)
def test_malformed_is_refused(data: bytes, named: str) -> None:
    with pytest.raises(CodecError, match=named):
        decode(step.Abort, data)


def test_unknown_finish_reason_is_refused() -> None:
    row = {"seq_id": 1, "position": 0, "token_id": 3, "finish": "tired"}
    with pytest.raises(CodecError, match="finish"):
        decode(step.Token, msgspec.msgpack.encode(row))


@pytest.mark.parametrize("value", [2**64, object()])
def test_what_msgpack_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(CodecError, match="Abort"):
        encode(step.Abort(seq_id=value, epoch=0))
