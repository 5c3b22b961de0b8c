"""What a chat request asks of tools and reasoning: for its prompt, and for reading its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.answer_reader import Reading
from deploy.openai_errors import ApiError
from deploy.openai_schema import ChatRequest, ClassifyRequest
from deploy.reasoning import MARKERS as REASONING_MARKERS
from deploy.reasoning import ends_in_reasoning
from deploy.served_model import ServedModel
from deploy.tokenize_schema import TokenizeRequest
from deploy.tokenizer import TextTokenizer
from deploy.tool_formats import FORMATS, JSON
from deploy.tool_prompt import describe_tools, with_tools
from deploy.tool_schema import NamedTool

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]


def tools_in_use(request: ChatRequest | ClassifyRequest | TokenizeRequest) -> Tools:
    """The tools that the model is shown: with `tool_choice` none it is shown none."""
    if isinstance(request, ClassifyRequest):
        return []
    if isinstance(request, ChatRequest) and request.tool_choice == "none":
        return []
    return [tool.as_sent for tool in request.tools or ()]


def arrange(
    model: ServedModel,
    messages: Messages,
    request: ChatRequest | ClassifyRequest | TokenizeRequest,
) -> tuple[Messages, Tools | None]:
    """Messages and tools for the chat template.

    Raises ApiError where this model has no way to call tools.
    """
    tools = tools_in_use(request)
    if model.tool_call_parser == JSON.name:
        description = ""
        if tools:
            must = _what_now(request) if isinstance(request, ChatRequest) else ""
            description = describe_tools([tool["function"] for tool in tools], must_call=must)
        # Such a template would drop the turns of tools without a word.
        return with_tools(messages, description), None
    if tools and model.tool_call_parser == "none":
        raise ApiError(
            "tools: this server does not read tool calls of this model (tool_call_parser is none)",
            param="tools",
            code="unsupported_parameter",
        )
    return messages, tools or None


def reading_of(model: ServedModel, request: ChatRequest, prompt: str) -> Reading:
    """How answers to the rendered `prompt` are read."""
    form = FORMATS[model.tool_call_parser] if tools_in_use(request) else None
    reasons = model.reasoning_parser == "think"
    last = request.messages[-1].for_template()["content"] if request.continue_final_message else ""
    continued = last if isinstance(last, str) else ""
    markers = (*(form.markers if form is not None else ()), *(REASONING_MARKERS if reasons else ()))
    return Reading(
        tool_format=form,
        one_call=request.parallel_tool_calls is False or isinstance(request.tool_choice, NamedTool),
        reasoning=reasons,
        reasoning_opened=reasons and ends_in_reasoning(prompt, continued),
        show_reasoning=request.include_reasoning,
        visible_ids=frozenset(special_ids(model.tokenizer, markers).values()),
    )


def must_call(request: ChatRequest) -> list[dict[str, Any]]:
    """The functions of which one has to be called; empty where there is a choice."""
    functions = [tool.function.as_sent for tool in request.tools or ()]
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        return [function for function in functions if function["name"] == name][:1]
    return functions if request.tool_choice == "required" else []


def _what_now(request: ChatRequest) -> str:
    """What a request says of the next answer's calls, in words for the model."""
    if isinstance(request.tool_choice, NamedTool):
        return f"Call {request.tool_choice.function.name} now."
    must = "You must call a function now." if request.tool_choice == "required" else ""
    at_most = "" if request.parallel_tool_calls else "Make one call at most."
    return f"{must} {at_most}".strip()


def special_ids(tokenizer: TextTokenizer | None, texts: Sequence[str]) -> dict[str, int]:
    """Those of `texts` that are special tokens, with their ids."""
    if tokenizer is None:
        return {}
    ids = ((text, tokenizer.token_id(text)) for text in texts)
    special = tokenizer.special_ids
    return {text: found for text, found in ids if found is not None and found in special}
