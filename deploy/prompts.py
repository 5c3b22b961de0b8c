"""From the texts of a request to token ids that the model can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.answer_reader import PLAIN, Reading
from deploy.openai_errors import ApiError
from deploy.openai_schema import ChatRequest, ClassifyRequest, CompletionRequest
from deploy.prompt_length import check_length
from deploy.served_model import ServedModel
from deploy.tokenize_schema import TokenizeRequest
from deploy.tokenizer import Detokenizer, TextTokenizer
from deploy.tool_choice import arrange, reading_of
from deploy.truncation import truncated

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One sequence's tokens. `text` is None where token ids were sent or a template wrote it."""

    token_ids: TokenIds
    text: str | None = None
    reading: Reading = PLAIN
    """How its answers are read."""


def chat_prompt(
    model: ServedModel, request: ChatRequest | ClassifyRequest | TokenizeRequest
) -> Prompt:
    """The rendered `messages`. Raises ApiError."""
    tokenizer = model.need_tokenizer("messages")
    messages = [message.for_template() for message in request.messages or ()]
    messages, tools = arrange(model, messages, request)
    text = model.need_template(request.chat_template).render(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        tools=tools,
        documents=request.documents,
        variables=request.variables,
    )
    if _must_fit(request):
        check_length(tokenizer, text, model.max_model_len, "messages")
    # The template writes its own special tokens: adding them again would double Jamba's BOS.
    special = bool(request.add_special_tokens)
    token_ids = tokenizer.encode(text, add_special_tokens=special, param="messages")
    if not isinstance(request, ChatRequest):
        return Prompt(token_ids=token_ids)
    return Prompt(
        token_ids=truncated(token_ids, request, model.max_model_len),
        reading=reading_of(model, request, text),
    )


def text_prompts(
    model: ServedModel, request: CompletionRequest | ClassifyRequest, param: str
) -> list[Prompt]:
    """One per text or list of token ids of the field `param`. Raises ApiError."""
    special = request.add_special_tokens is not False
    prompts: list[Prompt] = []
    for given in request.prompts:
        if isinstance(given, str):
            tokenizer = model.need_tokenizer(param)
            if _must_fit(request):
                check_length(tokenizer, given, model.max_model_len, param)
            ids = tokenizer.encode(given, add_special_tokens=special, param=param)
            prompts.append(Prompt(token_ids=ids, text=given))
        else:
            prompts.append(Prompt(token_ids=tuple(given)))
    if isinstance(request, CompletionRequest):
        prompts = [_cut(prompt, request, model.max_model_len) for prompt in prompts]
    return prompts


def _must_fit(request: ChatRequest | CompletionRequest | ClassifyRequest | TokenizeRequest) -> bool:
    """Whether a prompt that is too long is refused, not cut."""
    return isinstance(request, TokenizeRequest) or request.truncate_prompt_tokens is None


def _cut(prompt: Prompt, request: CompletionRequest, max_model_len: int) -> Prompt:
    kept = truncated(prompt.token_ids, request, max_model_len)
    # An echo shows what the model has seen.
    return prompt if kept == prompt.token_ids else Prompt(token_ids=kept)


def check_tokens(model: ServedModel, token_ids: Sequence[int], param: str) -> None:
    """Raises ApiError for a sequence without tokens or with one that the model does not have."""
    if not token_ids:
        raise ApiError(f"{param}: the prompt has no tokens", param=param)
    worst = next((t for t in token_ids if t >= model.vocab_size), None)
    if worst is not None:
        raise ApiError(
            f"{param}: token id {worst} is out of range, allowed are 0..{model.vocab_size - 1}",
            param=param,
        )


def too_long(model: ServedModel, what: str, param: str) -> ApiError:
    """The error for a sequence that the context cannot hold."""
    return ApiError(
        f"This model's maximum context length is {model.max_model_len} tokens; {what}.",
        param=param,
        code="context_length_exceeded",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """A prompt that is returned in front of its completion."""

    text: str
    offsets: tuple[int, ...]
    """Where each of its tokens begins in `text`."""

    @classmethod
    def of(
        cls, prompt: Prompt, tokenizer: TextTokenizer | None, *, skip_special_tokens: bool
    ) -> Echo:
        """The prompt's own text where one was sent, else its tokens' text (empty, untokenized)."""
        if tokenizer is None:
            return cls(text="", offsets=(0,) * len(prompt.token_ids))
        # Text may spell special tokens out, so none is skipped where it is compared.
        skip = skip_special_tokens and prompt.text is None
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        pieces = [detokenizer.push(token_id) for token_id in prompt.token_ids]
        text = "".join(pieces) + detokenizer.flush() if prompt.text is None else prompt.text
        return cls(text=text, offsets=tuple(_offsets(pieces, text)))


def _offsets(pieces: Sequence[str], text: str) -> list[int]:
    """Where each piece begins; one that is not in the text (an added BOS) takes no room."""
    offsets: list[int] = []
    at = 0
    for piece in pieces:
        offsets.append(at)
        # SentencePiece tokenizers put a space in front of the first word.
        for spelling in (piece, piece.removeprefix(" ")):
            if text.startswith(spelling, at):
                at += len(spelling)
                break
    return offsets
