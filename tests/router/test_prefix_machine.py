"""Prefix keys against the content itself: equal keys mean equal beginnings, and the reverse."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from router.prefix_keys import PrefixKeys
from tests.router.machines import Machine, drive, every_length

Content = tuple[str, str, tuple[int, ...]]

REGIMES = st.sampled_from(["short", "long"])
# Salts that would collide if they were glued to the regime or to the tokens.
SALTS = st.sampled_from(["", "a", "b", "\0", "\0a", "short", "long\0", "ä", "a\0\0\0\0\0\0\0"])
# Few tokens, so that beginnings meet; and what 8, 32 or 63 bits would fold together.
TOKENS = st.lists(st.sampled_from([0, 1, 1, 256, 2**31, 2**32 + 1, 2**63 - 1]), max_size=9)
indices = st.integers(0, 10**6)


class PrefixKeysMachine(Machine):
    """Sequences that grow and branch; every key that any of them has had, and of what."""

    @initialize(block_size=st.integers(1, 4))
    def create(self, block_size: int) -> None:
        self.block_size = block_size
        self.sequences: list[tuple[str, str, list[int], PrefixKeys]] = []
        self.key_of: dict[Content, bytes] = {}
        self.content_of: dict[bytes, Content] = {}

    @rule(regime=REGIMES, salt=SALTS, tokens=TOKENS)
    def begin(self, regime: str, salt: str, tokens: list[int]) -> None:
        keys = PrefixKeys(self.block_size, regime=regime, salt=salt)
        self.sequences.append((regime, salt, list(tokens), keys))

    @precondition(lambda self: self.sequences)
    @rule(which=indices, tokens=TOKENS)
    def grow(self, which: int, tokens: list[int]) -> None:
        self.sequences[which % len(self.sequences)][2].extend(tokens)

    @precondition(lambda self: self.sequences)
    @rule(which=indices, regime=REGIMES, salt=SALTS, parts_at=st.integers(0, 40), tokens=TOKENS)
    def branch(self, which: int, regime: str, salt: str, parts_at: int, tokens: list[int]) -> None:
        """The beginning of another one; regime and salt may be the same or not."""
        beginning = self.sequences[which % len(self.sequences)][2][:parts_at]
        self.begin(regime, salt, [*beginning, *tokens])

    @precondition(lambda self: self.sequences)
    @rule(which=indices, ahead=st.integers(0, 40))
    def ask(self, which: int, ahead: int) -> None:
        """Keys of any number of tokens, less than asked for before as well."""
        regime, salt, tokens, keys = self.sequences[which % len(self.sequences)]
        num_tokens = min(ahead, len(tokens))
        got = keys.up_to(tokens, num_tokens)
        ends = range(self.block_size, num_tokens + 1, self.block_size)
        assert len(got) == len(ends)
        for key, end in zip(got, ends, strict=True):
            content = (regime, salt, tuple(tokens[:end]))
            assert self.key_of.setdefault(content, key) == key, "one content has two keys"
            assert self.content_of.setdefault(key, content) == content, "two contents, one key"

    def check(self) -> None:
        assert len(self.key_of) == len(self.content_of)

    def finish(self) -> None:
        for which, (_, _, tokens, _) in enumerate(self.sequences):
            self.ask(which, len(tokens))


@every_length
def test_keys_are_equal_where_the_content_is(num_operations: int) -> None:
    drive(PrefixKeysMachine, num_operations)
