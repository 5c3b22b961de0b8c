"""Which sequence proves a model before it is said to be ready."""

from __future__ import annotations

from deploy.resolve import ResolvedArgs
from shards.spec import WarmUp


def warm_up_of(resolved: ResolvedArgs) -> WarmUp:
    """The first token that the vocabulary has; one more where there is a head and room for it."""
    unused = resolved.spec.unused_token_ids
    ids = range(resolved.vocab_size)
    token_id = next((i for i in ids if not any(a <= i < b for a, b in unused)), 0)
    makes_one = "lm" in resolved.facts.heads and resolved.spec.limits.max_model_len > 1
    return WarmUp(token_id=token_id, max_tokens=int(makes_one))
