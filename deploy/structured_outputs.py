"""Grammars of constrained answers: Lark text that llguidance's `LLMatcher` takes, checked here.

Each function raises ApiError 400 that names the field `param` and llguidance's reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from deploy.endless_schema import endless_reference
from deploy.grammar_check import GRAMMARS, TooComplex
from deploy.openai_errors import ApiError

MAX_CHOICES = 1_000
"""llguidance follows at most 2 000 alternatives at once."""
MAX_GRAMMAR_CHARS = 256 * 1024
"""Of the text that llguidance gets: its time grows with the square of some grammars' length."""

# Behind the text, so that line numbers in errors stay the caller's. Without it llguidance lets
# through only one tokenization of text that is forced, and that of an encoder we do not give it.
_EVERY_TOKENIZATION = '\n%llguidance {"no_forcing": true}\n'
# Special tokens are looked up where the vocabulary is, in the last stage.
_EXPECTED_WARNING = "no tokenizer"
_MAX_REASON = 300
# A space, or a new line and its indentation: a model that has lost its way could otherwise go on
# with white space for ever.
_SPACES = {"whitespace_pattern": r"[ \t]?|\r?\n[ \t]{0,32}"}
_PLACE_OF_SCHEMA = re.compile(r"^at 1\(8\): (failed to compile JSON schema: )?")


def schema_grammar(
    schema: Mapping[str, Any] | bool,
    *,
    param: str = "structured_outputs.json",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """JSON that the schema allows, its properties in the schema's order.

    `options` are llguidance's own, which the schema may hold as `x-guidance`.
    """
    return _checked(f"start: {lark_json(schema, param=param, options=options)}", param)


def lark_json(
    schema: Mapping[str, Any] | bool,
    *,
    param: str = "structured_outputs.json",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """`%json {...}`: the schema as a part of Lark text, which is yet to be checked."""
    if schema is True:
        schema = {}
    if isinstance(schema, Mapping):
        own = schema.get("x-guidance", {})
        if isinstance(own, Mapping):
            schema = {**schema, "x-guidance": {**_SPACES, **own, **options}}
    try:
        if (ref := endless_reference(schema)) is not None:
            named = f"its $ref {json.dumps(ref)}"
            raise _refused(param, f"{named} leads back to itself without end: no JSON keeps to it")
        return f"%json {json.dumps(schema, allow_nan=False)}"
    except (ValueError, TypeError, RecursionError) as error:
        raise _refused(param, f"not a JSON schema: {error}") from error


def choice_grammar(texts: Sequence[str], *, param: str = "structured_outputs.choice") -> str:
    """One of `texts`, character for character."""
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise _refused(param, f"{len(texts)} choices; allowed are 1..{MAX_CHOICES}")
    return _checked("start: " + " | ".join(map(json.dumps, texts)), param)


def regex_grammar(pattern: str, *, param: str = "structured_outputs.regex") -> str:
    """Text that the whole pattern matches: Rust's syntax, no look-around, no back references."""
    _check_unicode(pattern, param)
    return _checked(_lark_of_regex(pattern), param)


def lark_grammar(text: str, *, param: str = "structured_outputs.grammar") -> str:
    """A grammar in llguidance's Lark dialect."""
    return _checked(text, param)


def any_grammar(text: str, *, param: str = "structured_outputs.grammar") -> str:
    """A grammar in llguidance's Lark dialect, or GBNF whose `root` comes with `::=`."""
    _check_unicode(text, param)
    try:
        return _checked(any_to_lark(text), param)
    except ApiError:
        raise
    except Exception as error:  # the library raises bare Exception too
        raise _refused(param, str(error)) from error


def _lark_of_regex(pattern: str) -> str:
    (grammar,) = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
    return str(grammar["lark_grammar"])


def _checked(text: str, param: str) -> str:
    _check_unicode(text, param)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise _refused(
            param, f"{len(text)} characters as a grammar; allowed are {MAX_GRAMMAR_CHARS}"
        )
    grammar = text + _EVERY_TOKENIZATION
    try:
        found = GRAMMARS.messages(grammar)
    except TooComplex as error:
        raise _refused(param, str(error)) from error
    # Warnings are of keywords that would be ignored: what is asked for is honoured or refused.
    serious = [message for message in found if not message.startswith(_EXPECTED_WARNING)]
    if serious:
        raise _refused(param, serious[0])
    return grammar


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _refused(param, f"not valid Unicode: {error.reason}") from error


def _refused(param: str, reason: str) -> ApiError:
    # llguidance shows the place in the caller's own text below the first line.
    said = " ".join(reason.split("\n   1 |")[0].split())
    said = _PLACE_OF_SCHEMA.sub("", said)
    if len(said) > _MAX_REASON:
        said = f"{said[: _MAX_REASON // 3]} … {said[-_MAX_REASON // 3 * 2 :]}"
    return ApiError(f"{param}: {said}", param=param, code="invalid_grammar")
