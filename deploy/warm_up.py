"""Which sequence proves a model before it is said to be ready."""

from __future__ import annotations

from deploy.resolve import ResolvedArgs
from shards.spec import WarmUp


def warm_up_of(resolved: ResolvedArgs) -> WarmUp:
    """The first token that the vocabulary has, and one more where there is a head to make it."""
    unused = resolved.spec.unused_token_ids
    ids = range(resolved.vocab_size)
    token_id = next((i for i in ids if not any(a <= i < b for a, b in unused)), 0)
    return WarmUp(token_id=token_id, max_tokens=int("lm" in resolved.facts.heads))
