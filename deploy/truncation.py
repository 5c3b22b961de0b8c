"""Prompts that are cut to what the request or the context allows."""

from __future__ import annotations

from deploy.openai_schema import ChatRequest, CompletionRequest

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of /v1/completions."""
TokenIds = tuple[int, ...]


def truncated(
    token_ids: TokenIds, request: ChatRequest | CompletionRequest, max_model_len: int
) -> TokenIds:
    """The last `truncate_prompt_tokens` of a prompt, or with `truncation_side: right` the first.

    -1 keeps as many as leave room for the answer.
    """
    keep = request.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep == -1:
        keep = max(0, max_model_len - _room(request))
    if request.truncation_side == "right":
        return token_ids[:keep]
    return token_ids[max(0, len(token_ids) - keep) :]


def _room(request: ChatRequest | CompletionRequest) -> int:
    """Tokens of the answer; without a number a chat's may be as short as one."""
    if isinstance(request, CompletionRequest):
        return COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return request.max_completion_tokens or request.max_tokens or 1
