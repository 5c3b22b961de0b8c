"""The fields in which a request asks for an answer of a certain form, and their grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deploy.closed_model import Closed
from deploy.openai_errors import ApiError
from deploy.structured_outputs import (
    any_grammar,
    choice_grammar,
    regex_grammar,
    schema_grammar,
)

if TYPE_CHECKING:
    from deploy.openai_schema import ChatRequest, CompletionRequest
    from deploy.served_model import ServedModel

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_ANY_OBJECT = {"type": "object"}


class JsonSchemaFormat(Closed):
    """OpenAI's wrapper of a schema; the schema is kept to whatever `strict` says."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    json_schema: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Closed):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Closed):
    """vLLM's `structured_outputs`: one kind of constraint, and how JSON may be spaced."""

    json_schema: str | dict[str, Any] | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_fallback: bool = False
    """There is one backend, and no fallback from it."""
    disable_additional_properties: Literal[False] = False
    structural_tag: None = None
    """Calls of functions come with `tools`."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of constraint that are asked for."""
        values = (self.json_schema, self.regex, self.choice, self.grammar, self.json_object or None)
        return [kind for kind, value in zip(_KINDS, values, strict=True) if value is not None]


def requested_grammar(model: ServedModel, request: ChatRequest | CompletionRequest) -> str | None:
    """The grammar of the answers; None for any text. It takes time: call it off the event loop.

    Raises ApiError.
    """
    form, structured = request.response_format, request.structured_outputs
    constrains = form is not None and form.type != "text"
    if structured is not None:
        if constrains:
            raise ApiError(
                "structured_outputs: not allowed together with response_format",
                param="structured_outputs",
            )
        model.need_tokenizer("structured_outputs")
        return _structured(structured)
    if form is None or not constrains:
        return None
    model.need_tokenizer("response_format")
    return _formatted(form)


def _formatted(form: ResponseFormat) -> str:
    if form.type == "json_object":
        return schema_grammar(_ANY_OBJECT, param="response_format")
    if form.json_schema is None:
        raise ApiError(
            "response_format.json_schema: required with type json_schema", param="response_format"
        )
    return schema_grammar(form.json_schema.json_schema, param="response_format")


def _structured(asked: StructuredOutputs) -> str:
    if len(asked.kinds) != 1:
        raise ApiError(
            f"structured_outputs: exactly one of {', '.join(_KINDS)} is needed, "
            f"not {' and '.join(asked.kinds) or 'none'}",
            param="structured_outputs",
        )
    param = f"structured_outputs.{asked.kinds[0]}"
    spaced = asked.whitespace_pattern is not None or asked.disable_any_whitespace
    if spaced and asked.kinds[0] not in ("json", "json_object"):
        raise ApiError(
            "structured_outputs: whitespace_pattern and disable_any_whitespace are only allowed "
            "with json and json_object",
            param="structured_outputs",
        )
    if asked.regex is not None:
        return regex_grammar(asked.regex, param=param)
    if asked.choice is not None:
        return choice_grammar(asked.choice, param=param)
    if asked.grammar is not None:
        return any_grammar(asked.grammar, param=param)
    return schema_grammar(_schema(asked, param), param=param, options=_spaces(asked))


def _schema(asked: StructuredOutputs, param: str) -> dict[str, Any] | bool:
    schema: object = asked.json_schema
    if schema is None:
        return _ANY_OBJECT
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"{param}: not JSON: {error}", param=param) from error
    if not isinstance(schema, dict | bool):
        raise ApiError(f"{param}: a schema is an object, true or false", param=param)
    return schema


def _spaces(asked: StructuredOutputs) -> dict[str, Any]:
    """llguidance's options for white space between the parts of JSON."""
    options: dict[str, Any] = {}
    if asked.whitespace_pattern is not None:
        options["whitespace_pattern"] = asked.whitespace_pattern
    if asked.disable_any_whitespace:
        options["whitespace_pattern"], options["whitespace_flexible"] = None, False
    return options
