"""Messages to bytes and back: msgpack, typed and checked on arrival."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

_Message = TypeVar("_Message")
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


def _decoder(cls: type[Any]) -> msgspec.msgpack.Decoder[Any]:
    # Building a typed decoder costs far more than one decode.
    decoder = _decoders.get(cls)
    if decoder is None:
        decoder = _decoders[cls] = msgspec.msgpack.Decoder(cls)
    return decoder
