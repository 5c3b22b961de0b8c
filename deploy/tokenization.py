"""/tokenize and /detokenize: what a text becomes before a model sees it, and back."""

from __future__ import annotations

from deploy.field_warnings import field_warnings
from deploy.openai_errors import ApiError, Json
from deploy.openai_schema import ApiRequest
from deploy.prompt_length import check_length
from deploy.prompts import chat_prompt
from deploy.served_model import ServedModel
from deploy.tokenize_schema import DetokenizeRequest, TokenizeRequest

_ALWAYS_IDS = 1 << 16


def check_id_count(body: object, max_model_len: int) -> None:
    """Raises ApiError for more ids than /detokenize takes, before any of them is looked at."""
    tokens = body.get("tokens") if isinstance(body, dict) else None
    bound = max(_ALWAYS_IDS, max_model_len)
    if isinstance(tokens, list) and len(tokens) > bound:
        raise ApiError(f"tokens: {len(tokens)} token ids, allowed are {bound}", param="tokens")


def tokenize_body(model: ServedModel, request: TokenizeRequest) -> Json:
    """vLLM's answer: `count`, `max_model_len`, `tokens`, `token_strs`. Raises ApiError."""
    request.check()
    if request.messages is not None:
        token_ids = chat_prompt(model, request).token_ids
    else:
        tokenizer = model.need_tokenizer("prompt")
        special = request.add_special_tokens is not False
        text = request.prompt or ""
        check_length(tokenizer, text, model.max_model_len, "prompt")
        token_ids = tokenizer.encode(text, add_special_tokens=special, param="prompt")
    strings = None
    if request.return_token_strs:
        tokenizer = model.need_tokenizer("return_token_strs")
        strings = [tokenizer.token_text(token_id) for token_id in token_ids]
    body: Json = {
        "count": len(token_ids),
        "max_model_len": model.max_model_len,
        "tokens": list(token_ids),
        "token_strs": strings,
    }
    return _with_warnings(body, model, request)


def detokenize_body(model: ServedModel, request: DetokenizeRequest) -> Json:
    """vLLM's answer, `prompt`; special tokens are spelled out. Raises ApiError."""
    tokenizer = model.need_tokenizer("tokens")
    worst = next((t for t in request.tokens if t >= model.vocab_size), None)
    if worst is not None:
        raise ApiError(
            f"tokens: token id {worst} is out of range, allowed are 0..{model.vocab_size - 1}",
            param="tokens",
        )
    text = tokenizer.decode(request.tokens, skip_special_tokens=False)
    return _with_warnings({"prompt": text}, model, request)


def _with_warnings(body: Json, model: ServedModel, request: ApiRequest) -> Json:
    found = field_warnings(model, request)
    return {**body, "warnings": list(found)} if found else body
