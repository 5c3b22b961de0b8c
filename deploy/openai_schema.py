"""Requests of the generating routes and of /v1/classify, with vLLM's names for extensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deploy.answer_format import ResponseFormat, StructuredOutputs
from deploy.message_schema import Message
from deploy.openai_errors import ApiError
from deploy.tool_schema import MAX_TOOLS, Tool, ToolChoice, refuse_tool_choice
from deploy.unsupported import KNOWN_FIELDS, refuse_unsupported
from deploy.validation_errors import validation_error

INT64 = 2**63
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP = 4096
"""Characters of a stop string or a bad word."""

TokenId = Annotated[int, Field(ge=0, lt=INT64)]
# The first bad entry ends the check: one error for each of a million would take minutes.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Bias = Annotated[float, Field(ge=-100, le=100)]
MAX_BIASES = 1024
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Truncation = Annotated[int, Field(ge=-1, lt=INT64)]
"""How many of a prompt's tokens to keep, at least 1; -1: as many as fit."""
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Strings = Annotated[list[str], Field(fail_fast=True)]
Texts = str | Strings | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]


def _few_biases(value: Any) -> Any:
    """Before each of them is looked at: a dictionary's check has no early end."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"{len(value)} entries; allowed are {MAX_BIASES}")
    return value


class _Strict(BaseModel):
    # Strict: "0.5" is no temperature and true is no seed. Unknown fields are kept to be named.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @property
    def unknown_fields(self) -> list[str]:
        """Fields that nobody here knows; they are named in the response's warnings."""
        return [key for key in self.model_extra or () if key not in KNOWN_FIELDS]


class StreamOptions(_Strict):
    """What a stream carries beside its text."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class ApiRequest(_Strict):
    """Any request; without `model` it is for the one that is served."""

    model: str | None = None


class GenerationRequest(ApiRequest):
    """Fields that both routes share; None means the checkpoint's or OpenAI's default."""

    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=INT64)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # A quotient of logits: with less they would leave the range of float32.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_few_biases)] | None = None
    bad_words: Annotated[list[Stop], Field(max_length=256)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=2**20)] | None = None
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Priority = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Stop strings, none of them empty."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def unknown_fields(self) -> list[str]:
        """Those of `stream_options` too."""
        nested = self.stream_options.unknown_fields if self.stream_options is not None else []
        return [*super().unknown_fields, *(f"stream_options.{key}" for key in nested)]


class TemplateFields(ApiRequest):
    """What a chat template is given beside the messages."""

    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=2**18)] | None = None
    """A template's name or, where the server trusts it, its text."""
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None

    @property
    def unknown_fields(self) -> list[str]:
        """Those of content parts too."""
        messages: Sequence[Message] = getattr(self, "messages", None) or ()
        nested = {f"messages.{key}": None for each in messages for key in each.unread_fields}
        return [*super().unknown_fields, *nested]

    @property
    def variables(self) -> dict[str, Any]:
        """For the template, by name."""
        given = self.chat_template_kwargs or {}
        effort = self.reasoning_effort
        return given if effort is None else {"reasoning_effort": effort, **given}


class ChatRequest(GenerationRequest, TemplateFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @property
    def wanted_logprobs(self) -> int | None:
        """None, or how many alternatives beside the sampled token."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: text, token ids, or a list of either."""

    prompt: Texts
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt. Raises ApiError when there is none."""
        return _one_by_one(self.prompt, "prompt")


class ClassifyRequest(TemplateFields):
    """POST /v1/classify: `input` as a completion's prompt, or one chat's `messages`."""

    input: Texts | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    truncate_prompt_tokens: Truncation | None = None
    use_activation: bool = True
    """False: the head's scores as they are."""
    add_special_tokens: bool | None = None
    """None: with text, not with `messages`, whose template writes its own."""
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    priority: Priority = 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per input. Raises ApiError when there is none."""
        return _one_by_one([] if self.input is None else self.input, "input")


def _one_by_one(texts: Texts, param: str) -> list[str | list[int]]:
    if isinstance(texts, str):
        return [texts]
    if not texts:
        raise ApiError(f"{param}: must not be an empty list", param=param)
    # The type allows lists of one kind only: all token ids, or none.
    token_ids: list[int] = []
    prompts: list[str | list[int]] = []
    for entry in texts:
        if isinstance(entry, int):
            token_ids.append(entry)
        else:
            prompts.append(entry)
    return prompts or [token_ids]


Request = TypeVar("Request", bound=ApiRequest)


def parse_request(kind: type[Request], body: object, *, strict: bool = False) -> Request:
    """Check a decoded body; `strict` refuses unknown fields.

    Raises ApiError 400 that names the field.
    """
    if not isinstance(body, Mapping) or not all(isinstance(key, str) for key in body):
        raise ApiError("the request body must be a JSON object")
    refuse_unsupported(body, kind.model_fields)
    try:
        request = kind.model_validate({k: v for k, v in body.items() if v is not None})
    except ValidationError as error:
        raise validation_error(error) from None
    if strict and request.unknown_fields:
        name = request.unknown_fields[0]
        raise ApiError(
            f"{name}: unknown parameter; this server refuses what it does not know",
            param=name,
            code="unknown_parameter",
        )
    if isinstance(request, ClassifyRequest):
        _refuse_input(request)
    elif isinstance(request, ChatRequest | CompletionRequest):
        _refuse_combinations(request)
    if isinstance(request, ChatRequest | CompletionRequest | ClassifyRequest):
        _refuse_truncation(request)
    if isinstance(request, ChatRequest | ClassifyRequest):
        refuse_continuation(request.continue_final_message, request.add_generation_prompt)
    return request


def _refuse_combinations(request: ChatRequest | CompletionRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options: only allowed with stream=true", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError("prompt_logprobs: not available with stream=true", param="prompt_logprobs")
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise ApiError(
            "truncation_side: only allowed with truncate_prompt_tokens", param="truncation_side"
        )
    if isinstance(request, CompletionRequest):
        if request.max_tokens == 0 and not request.echo:
            raise ApiError("max_tokens: 0 is only allowed with echo=true", param="max_tokens")
        return
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs: only allowed with logprobs=true", param="top_logprobs")
    refuse_tool_choice(request.tools or (), request.tool_choice)


def _refuse_input(request: ClassifyRequest) -> None:
    if request.input is None and request.messages is None:
        raise ApiError(
            "input: required, unless there are messages",
            param="input",
            code="missing_required_parameter",
        )
    if request.input is not None and request.messages is not None:
        raise ApiError("messages: not allowed together with input", param="messages")


def _refuse_truncation(request: ChatRequest | CompletionRequest | ClassifyRequest) -> None:
    if request.truncate_prompt_tokens == 0:
        raise ApiError(
            "truncate_prompt_tokens: 0 leaves nothing; allowed are -1 and numbers of at least 1",
            param="truncate_prompt_tokens",
        )


def refuse_continuation(continues: bool, begins: bool) -> None:
    """A turn can be continued, or a new one begun. Raises ApiError."""
    if continues and begins:
        raise ApiError(
            "continue_final_message: only allowed with add_generation_prompt=false",
            param="continue_final_message",
        )
