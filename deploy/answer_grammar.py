"""The grammar of a request's answers: reasoning, tool calls and structured outputs as one."""

from __future__ import annotations

from deploy.answer_format import requested_grammar
from deploy.answer_reader import Reading
from deploy.openai_errors import ApiError
from deploy.openai_schema import ChatRequest, CompletionRequest
from deploy.reasoning import MARKERS
from deploy.served_model import ServedModel
from deploy.structured_outputs import lark_grammar
from deploy.tool_choice import must_call, special_ids, tools_in_use
from deploy.tool_formats import FORMATS, JSON, ToolFormat
from deploy.tool_grammar import SpecialIds, calls_grammar, reasoning_rules


def answer_grammar(
    model: ServedModel, request: ChatRequest | CompletionRequest, reading: Reading
) -> str | None:
    """None for any text. It takes time: call it off the event loop. Raises ApiError.

    Reasoning is free; only what follows it keeps to the form that is asked for. Where tools may be
    called, the answer is calls or of that form; where one has to be called it is calls.
    """
    form = requested_grammar(model, request)
    if not isinstance(request, ChatRequest):
        return form
    calls, param = None, "response_format" if request.response_format else "structured_outputs"
    if reading.tool_format is not None:
        calls = _calls(model, request, reading, reading.tool_format, has_form=form is not None)
        param = param if calls is None else "tools"
    if calls is None and (form is None or not reading.reasoning):
        return form
    ids = special_ids(model.tokenizer, MARKERS)
    rules = []
    if reading.reasoning:
        rules.append(reasoning_rules(opened=reading.reasoning_opened, special_ids=ids))
    answers = []
    for name, text in (("calls", calls), ("form", form)):
        if text is not None and not (name == "form" and must_call(request)):
            answers.append(name)
            rules.append(f"{name}: %lark {{\n{text}\n}}")
    if calls is not None and form is None and not must_call(request):
        assert reading.tool_format is not None
        rules.append(_text_without(reading.tool_format.markers[0]))
        answers = ["TEXT calls?"]
    first = "reasoning" if reading.reasoning else ""
    start = f"start: {first} ({' | '.join(answers)})"
    return lark_grammar("\n".join([start, *rules]), param=param)


def asks_grammar(request: ChatRequest | CompletionRequest, reading: Reading) -> bool:
    """Whether there may be anything to compile."""
    forms = (request.response_format, request.structured_outputs)
    return reading.tool_format is not None or any(form is not None for form in forms)


def _text_without(marker: str) -> str:
    """The terminal `TEXT`: where the marker is one special token, ordinary ones must not spell it,
    for whoever reads the answer sees the same."""
    return rf"TEXT: /(.|\n)*/ & ~/(.|\n)*{marker}(.|\n)*/"


def grammar_warnings(
    model: ServedModel, request: ChatRequest | CompletionRequest
) -> tuple[str, ...]:
    """What is asked for and has no effect."""
    if not isinstance(request, ChatRequest):
        return ()
    if must_call(request):
        form = request.response_format is not None and request.response_format.type != "text"
        fields = {"response_format": form, "structured_outputs": request.structured_outputs}
        return tuple(
            f"{field} has no effect where a tool has to be called"
            for field, value in fields.items()
            if value
        )
    if request.tools and tools_in_use(request) and _strict_works(model):
        return ()
    return tuple(
        f"tools.{i}.function.strict has no effect unless tool_choice is required or a function"
        for i, tool in enumerate(request.tools or ())
        if tool.function.strict
    )


def _calls(
    model: ServedModel,
    request: ChatRequest,
    reading: Reading,
    tool_format: ToolFormat,
    *,
    has_form: bool,
) -> str | None:
    """The grammar of calls, if any of the answers have to keep to one."""
    functions = must_call(request)
    if not functions:
        if has_form and tool_format is JSON:
            raise ApiError(
                "tools: this model calls tools by JSON, which a form of the answer rules out; "
                "allowed with response_format and structured_outputs is tool_choice none, "
                "required or a function",
                param="tools",
            )
        strict = any(tool.function.strict for tool in request.tools or ())
        if not has_form and not (strict and _strict_works(model)):
            return None
        functions = [tool["function"] for tool in tools_in_use(request)]
    return calls_grammar(
        tool_format,
        functions,
        one_call=reading.one_call,
        special_ids=_marker_ids(model, tool_format),
    )


def _strict_works(model: ServedModel) -> bool:
    """Whether calls can be held to schemas although the model may also just answer.

    Only a special token tells beyond doubt that a call begins.
    """
    tool_format = FORMATS.get(model.tool_call_parser)
    if tool_format is None or not tool_format.markers:
        return False
    return len(_marker_ids(model, tool_format)) == len(tool_format.markers)


def _marker_ids(model: ServedModel, tool_format: ToolFormat) -> SpecialIds:
    return special_ids(model.tokenizer, tool_format.markers)
