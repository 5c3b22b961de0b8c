"""Chat templates: the checkpoint's own Jinja text, rendered in a sandbox as Transformers does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from deploy.chat_environment import Limits, compiled, template_line
from deploy.openai_errors import ApiError

DEFAULT = "default"
WITH_TOOLS = "tool_use"
# Variables that come from fields of the request.
_OWN_FIELDS = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)
# The space tells whether the template trims: then the mark arrives without it.
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MOST_WORDS = 500

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """A template that cannot be read or does not compile; the message says where."""


class ChatTemplate:
    """One compiled template and the special tokens that it may name."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        param: str = "messages",
        limits: Limits | None = None,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._param = param
        self._limits = limits or Limits()
        try:
            self._compiled = compiled(source)
        # Odd nesting fails in Python's own compiler, with errors that are not Jinja's.
        except Exception as error:
            raise ChatTemplateError(
                f"the chat template does not compile{_where(error)}: {_words(error)}"
            ) from error

    @property
    def reads(self) -> Collection[str]:
        """Names of the variables that it looks at, in whichever branch."""
        return self._compiled.reads

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises ApiError 400 with the template's own words."""
        _refuse_own_fields(variables or {})
        turns = [_as_transformers(message) for message in messages]
        values = {
            **self._special_tokens,
            **(variables or {}),
            "messages": _mark_last(turns) if continue_final_message else turns,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._compiled.render(values, self._limits)
        except Exception as error:  # a template runs whatever its author wrote
            raise ApiError(
                f"{self._param}: the chat template failed{_where(error)}: {_words(error)}",
                param=self._param,
                code="chat_template_error",
            ) from error
        return _cut_at_mark(text) if continue_final_message else text


class ChatTemplates:
    """A checkpoint's templates by name; without one of their own, requests get `default`."""

    def __init__(
        self, by_name: Mapping[str, ChatTemplate], special_tokens: Mapping[str, str]
    ) -> None:
        self._by_name = dict(by_name)
        self._special_tokens = special_tokens

    @property
    def names(self) -> list[str]:
        """In alphabetical order."""
        return sorted(self._by_name)

    def named(self, name: str) -> ChatTemplates | None:
        """Only that one, for every request; None where there is none."""
        found = self._by_name.get(name)
        return None if found is None else ChatTemplates({DEFAULT: found}, self._special_tokens)

    def written(self, source: str) -> ChatTemplates:
        """A request's own. Raises ApiError 400."""
        try:
            template = ChatTemplate(source, self._special_tokens, param="chat_template")
        except ChatTemplateError as error:
            message = f"chat_template: {error}"
            raise ApiError(message, param="chat_template", code="chat_template_error") from error
        return ChatTemplates({DEFAULT: template}, self._special_tokens)

    def choose(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """As Transformers does: `tool_use` where there are tools, else `default`.

        Raises ApiError 400 where it is not there.
        """
        name = WITH_TOOLS if tools is not None and WITH_TOOLS in self._by_name else DEFAULT
        if name not in self._by_name:
            raise ApiError(
                "chat_template: required, because this checkpoint has no default one; "
                f"allowed values: {', '.join(self.names)}",
                param="chat_template",
                code="chat_template_missing",
            )
        return self._by_name[name]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """`ChatTemplate.render` of the one that is chosen. Raises ApiError 400.

        OpenAI's newer name of the system's turns, `developer`, is theirs to templates without it.
        """
        template = self.choose(tools)
        if "developer" not in template.source:
            messages = [
                {**message, "role": "system"} if message.get("role") == "developer" else message
                for message in messages
            ]
        return template.render(messages, tools=tools, **options)


def _refuse_own_fields(variables: Mapping[str, Any]) -> None:
    own = next((name for name in _OWN_FIELDS if name in variables), None)
    if own is not None:
        raise ApiError(
            f"chat_template_kwargs: {own} is a field of the request itself",
            param="chat_template_kwargs",
        )


def _as_transformers(message: Message) -> dict[str, Any]:
    """Without fields that are null, and with reasoning under each name that templates use."""
    turn = {key: value for key, value in message.items() if value is not None}
    reasoning = next((turn[key] for key in _REASONING if key in turn), None)
    if reasoning is not None:
        turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
    return turn


def _where(error: Exception) -> str:
    line = template_line(error)
    return "" if line is None else f" at line {line}"


def _words(error: Exception) -> str:
    """The error's own, short: it may quote a message."""
    own = isinstance(error, TemplateError) and str(error)
    words = str(error) if own else f"{type(error).__name__}: {error}"
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}..."


def _mark_last(messages: Sequence[Message]) -> list[Message]:
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise _cannot_continue("has no text")
    return [*messages[:-1], {**messages[-1], "content": content + _CONTINUE_MARK}]


def _cut_at_mark(text: str) -> str:
    """Everything before the mark; without the space before it if the template trims content."""
    at = text.rfind(_CONTINUE_MARK.strip())
    if at < 0:
        raise _cannot_continue("is not in the rendered prompt")
    whole = text.startswith(_CONTINUE_MARK, at)
    return text[:at] if whole else text[:at].rstrip()


def _cannot_continue(why: str) -> ApiError:
    return ApiError(
        f"continue_final_message: the last message {why}", param="continue_final_message"
    )
