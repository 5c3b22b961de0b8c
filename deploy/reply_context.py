"""What every object of a response shares, from the request that it answers."""

from __future__ import annotations

import time

from deploy.answer_grammar import grammar_warnings
from deploy.field_warnings import field_warnings
from deploy.openai_replies import ReplyContext
from deploy.openai_schema import ChatRequest, CompletionRequest
from deploy.served_model import ServedModel


def reply_context(
    model: ServedModel, request: ChatRequest | CompletionRequest, request_id: str
) -> ReplyContext:
    """The response's id is that of the request, behind OpenAI's prefix."""
    chat = isinstance(request, ChatRequest)
    options = request.stream_options
    return ReplyContext(
        request_id=f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
        model=model.name,
        created=int(time.time()),
        tokenizer=model.tokenizer,
        chat=chat,
        num_logprobs=(
            request.wanted_logprobs if isinstance(request, ChatRequest) else request.logprobs
        ),
        num_prompt_logprobs=request.prompt_logprobs,
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        token_ids=bool(request.return_token_ids),
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        warnings=(*field_warnings(model, request), *grammar_warnings(model, request)),
    )
