"""What a request will ask of the engine, guessed before anything of it is tokenized."""

from __future__ import annotations

from deploy.admission import Work
from deploy.message_schema import Message
from deploy.openai_schema import ChatRequest, ClassifyRequest, CompletionRequest

_CHARS_PER_TOKEN = 4
"""Of English; others have fewer, so this promises too little work rather than too much."""
_SOME_TOKENS = 2**31
"""Stands for the rest of the context."""


def predicted_works(request: ChatRequest | CompletionRequest | ClassifyRequest) -> list[Work]:
    """One per sequence. Raises ApiError for a request without a prompt."""
    if isinstance(request, ClassifyRequest):
        return [Work(prompt_tokens=n, max_tokens=0) for n in _prompt_tokens(request)]
    max_tokens = request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        max_tokens = request.max_completion_tokens
    max_tokens = _SOME_TOKENS if max_tokens is None else max_tokens
    works = [Work(prompt_tokens=n, max_tokens=max_tokens) for n in _prompt_tokens(request)]
    return [work for work in works for _ in range(request.n or 1)]


def num_sequences(request: ChatRequest | CompletionRequest | ClassifyRequest) -> int:
    """How many there will be. Raises ApiError for a request without a prompt."""
    if isinstance(request, ChatRequest):
        return request.n or 1
    if isinstance(request, ClassifyRequest):
        return 1 if request.messages is not None else len(request.prompts)
    return len(request.prompts) * (request.n or 1)


def _prompt_tokens(request: ChatRequest | CompletionRequest | ClassifyRequest) -> list[int]:
    if isinstance(request, CompletionRequest) or request.messages is None:
        return [
            _tokens(len(given)) if isinstance(given, str) else len(given)
            for given in request.prompts
        ]
    return [_tokens(sum(map(_chars, request.messages)))]


def _chars(message: Message) -> int:
    content = message.content
    if isinstance(content, list):
        return sum(len(part.text) for part in content)
    return len(content or "")


def _tokens(num_chars: int) -> int:
    return max(1, num_chars // _CHARS_PER_TOKEN)
