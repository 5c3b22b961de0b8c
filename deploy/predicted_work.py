"""What a request will ask of the engine, guessed before anything of it is tokenized."""

from __future__ import annotations

from deploy.admission import Work
from deploy.message_schema import Message
from deploy.openai_schema import ChatRequest, ClassifyRequest, CompletionRequest
from deploy.tokenize_schema import TokenizeRequest

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


def text_size(
    request: ChatRequest | CompletionRequest | ClassifyRequest | TokenizeRequest,
) -> int:
    """Characters that are to be tokenized, more or less: what a template adds is not known."""
    if isinstance(request, CompletionRequest) or request.messages is None:
        texts = [request.prompt or ""] if isinstance(request, TokenizeRequest) else request.prompts
        return sum(len(text) for text in texts if isinstance(text, str))
    also = (getattr(request, "tools", None), request.documents, request.chat_template_kwargs)
    return sum(map(_chars, request.messages)) + sum(len(repr(each)) for each in also if each)


def _prompt_tokens(request: ChatRequest | CompletionRequest | ClassifyRequest) -> list[int]:
    if isinstance(request, CompletionRequest) or request.messages is None:
        return [
            _tokens(len(given)) if isinstance(given, str) else len(given)
            for given in request.prompts
        ]
    return [_tokens(sum(map(_chars, request.messages)))]


def _chars(message: Message) -> int:
    content = message.content
    also = (message.reasoning_content, message.tool_calls, message.model_extra)
    beside = sum(len(repr(each)) for each in also if each)
    if isinstance(content, list):
        return sum(len(part.text) for part in content) + beside
    return len(content or "") + beside


def _tokens(num_chars: int) -> int:
    return max(1, num_chars // _CHARS_PER_TOKEN)
