"""Messages to bytes and back: msgpack, typed and checked on arrival."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from router.step import StepResult, TokenBatch, WantedBatch, WantedRows
from router.transport.base import Frame, Header

_Message = TypeVar("_Message")
_Rows = TypeVar("_Rows", StepResult, TokenBatch)
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}


class CodecError(ValueError):
    """A message cannot be written, or what arrived is not a message of that class."""


def encode(obj: object) -> bytes:
    """One message dataclass as msgpack. Raises CodecError for values msgpack cannot hold."""
    try:
        return _encoder.encode(obj)
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise CodecError(f"{type(obj).__name__}: {error}") from error


def decode(cls: type[_Message], data: bytes | bytearray | memoryview) -> _Message:
    """The message of class `cls` in `data`. Raises CodecError naming the field at fault."""
    try:
        message: _Message = _decoder(cls).decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CodecError(f"{cls.__name__}: {error}") from error
    return message


def frame_with_rows(header: Header, message: StepResult | TokenBatch) -> Frame:
    """A result or a batch of tokens as a frame; its wanted rows, often large, are a buffer."""
    plain = replace(message, wanted=()) if message.wanted else message
    return Frame(header, encode(plain), rows_buffer(message.wanted))


def read_with_rows(cls: type[_Rows], frame: Frame) -> _Rows:
    """The message of `frame_with_rows`. Raises CodecError."""
    message = decode(cls, frame.meta)
    return replace(message, wanted=read_rows_buffer(frame.buffers)) if frame.buffers else message


def rows_buffer(rows: tuple[WantedRows, ...]) -> tuple[memoryview, ...]:
    """Wanted rows as one frame buffer; none at all without rows."""
    return (memoryview(encode(WantedBatch(rows=rows))),) if rows else ()


def read_rows_buffer(buffers: tuple[memoryview, ...]) -> tuple[WantedRows, ...]:
    """The rows of `rows_buffer`. Raises CodecError."""
    return decode(WantedBatch, buffers[0]).rows if buffers else ()


def _decoder(cls: type[Any]) -> msgspec.msgpack.Decoder[Any]:
    # Building a typed decoder costs far more than one decode.
    decoder = _decoders.get(cls)
    if decoder is None:
        decoder = _decoders[cls] = msgspec.msgpack.Decoder(cls)
    return decoder
