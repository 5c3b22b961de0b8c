"""`python -m deploy.grammar_child`: compiles what it reads, as the last stage will, and says how.

A process of its own, because a few hundred bytes of grammar can take for ever, or all memory, or
the whole stack. Frames are a little-endian uint32 length and that many bytes: grammars come in,
JSON lists of llguidance's messages go out.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import threading
from typing import BinaryIO

from llguidance import LLMatcher

from shards.grammar import Grammars
from shards.vocabulary import Vocabulary

LENGTH = struct.Struct("<I")
_MEMORY_BYTES = 2 << 30
_STACK_BYTES = 2 << 20
"""A quarter of a stage's: what is deep enough to end a stage ends this process first."""
_NUM_BYTES = 256


def read_frame(source: BinaryIO) -> bytes | None:
    """The next one; None at the end."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    return source.read(length)


def write_frame(target: BinaryIO, body: bytes) -> None:
    """One frame, and out with it."""
    target.write(LENGTH.pack(len(body)) + body)
    target.flush()


def _messages(grammars: Grammars, grammar: str) -> list[str]:
    """Errors and warnings. Only a grammar that names no special token can be begun here."""
    _, found = LLMatcher.validate_grammar_with_warnings(grammar)
    if found:
        return list(found)
    constraint = grammars.begin(grammar, ())
    constraint.mask(_NUM_BYTES)
    return [constraint.error] if constraint.error else []


def _serve() -> None:
    tokens = [bytes([value]) for value in range(_NUM_BYTES)]
    eos = len(tokens)
    grammars = Grammars(Vocabulary.of([*tokens, b"<eos>"], {eos}, (eos,)))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    write_frame(target, b"[]")  # ready
    while (body := read_frame(source)) is not None:
        write_frame(target, json.dumps(_messages(grammars, body.decode())).encode())


def main() -> None:
    """Until the parent closes the pipe, or is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
