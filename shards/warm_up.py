"""The sequence that proves a new group: a token through all workers before the first client's."""

from __future__ import annotations

import logging
from collections.abc import Callable

from router.step import FinishReason, SamplingParams, Token
from shards.journal import JournalEntry
from shards.spec import WarmUp

log = logging.getLogger("conclave.group")

WARM_UP_ID = 0
"""Its sequence; those of clients begin at 1."""


def warm_up_entry(warm_up: WarmUp, done: Callable[[], None]) -> JournalEntry:
    """What goes into the journal; `done` is called once, when it has ended.

    An error of its own, such as a value that is not finite, is the sequence's, as it would be a
    client's: the group has answered.
    """

    def deliver(item: object) -> None:
        if not isinstance(item, Token | Exception):
            return
        error = item if isinstance(item, Exception) else item.error
        if error or (isinstance(item, Token) and item.finish is FinishReason.ERROR):
            log.warning("the first token cannot be made: %s", error or "it is not finite")
        done()

    sampling = SamplingParams(max_tokens=warm_up.max_tokens, temperature=0.0)
    return JournalEntry(WARM_UP_ID, (warm_up.token_id,), sampling, 0, deliver)
