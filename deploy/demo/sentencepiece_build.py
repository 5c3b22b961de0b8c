"""Build a sentencepiece model that makes whole words into tokens and spells everything else.

Sentencepiece merges symbols bottom-up and knows no word boundaries. They come from unused pieces:
merges that are undone in the result, but meanwhile keep a letter from joining a word that goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import ascii_lowercase

from sentencepiece import sentencepiece_model_pb2 as proto

_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
# Merges happen in this order; within one, from the left of the text to its right.
_START, _FOLLOW, _FINISH, _NEVER = 0, 1, 2, 3


def build_model(
    tokens: Sequence[str | int | None], *, control: Sequence[str], unknown: str, bos: str
) -> bytes:
    """Serialised model whose piece `i` is `tokens[i]`: a text, a byte, or None for no token.

    Words start with a capital letter or a space and go on with lower-case letters: one is a token
    unless a lower-case letter follows. Ids beyond `tokens` only help to merge.
    """
    model = proto.ModelProto()
    model.trainer_spec.model_type = _BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_piece = unknown
    model.trainer_spec.bos_piece = bos
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = False
    for index, token in enumerate(tokens):
        if isinstance(token, int):
            model.pieces.add(piece=f"<0x{token:02X}>", score=0.0, type=_BYTE)
        elif token is None:
            model.pieces.add(piece=f"<unused_{index}>", score=-_NEVER, type=_UNUSED)
        elif token in control:
            kind = _UNKNOWN if token == unknown else _CONTROL
            model.pieces.add(piece=token, score=0.0, type=kind)
        else:
            model.pieces.add(piece=token, score=-_FINISH, type=_NORMAL)
    words = [token for token in tokens if isinstance(token, str) and token not in control]
    for piece, order in sorted(helper_pieces(words).items()):
        model.pieces.add(piece=piece, score=-order, type=_UNUSED)
    return bytes(model.SerializeToString(deterministic=True))


def helper_pieces(words: Iterable[str]) -> dict[str, int]:
    """Unused pieces and the order of their merges.

    A word grows from its first letter to its last but one. Then letters that have a neighbour on
    the right pair up with it, so that a last letter stands alone only where the word ends.
    """
    known = set(words)
    pieces = {a + b: _FOLLOW for a in ascii_lowercase for b in ascii_lowercase}
    for word in sorted(known):
        # Growth stops before any shorter word, which would come out as a token of its own.
        stop = next(i for i in range(1, len(word) + 1) if word[:i] in known) - 1
        pieces |= {word[:i]: _START for i in range(2, stop + 1)}
        rest = word[stop:]
        if len(rest) % 2 == 0:  # its last letters pair up at the end of the word too
            pieces |= {rest[-2:] + letter: _FOLLOW for letter in ascii_lowercase}
        pieces |= {word[:i]: _FINISH for i in range(stop + 2, len(word), 2)}
    assert not pieces.keys() & known
    return pieces
