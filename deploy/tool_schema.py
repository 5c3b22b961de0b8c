"""Tools and tool calls in requests: types, checks, and their shape for chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from deploy.closed_model import Closed
from deploy.openai_errors import ApiError
from deploy.request_json import is_deep
from deploy.surrogates import refuse_surrogates

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_CHOICES = 'none, auto, required, {"type": "function", "function": {"name": ...}}'


class _Kept(BaseModel):
    """Checked, and kept as it was sent: templates print tools whole, in the sender's order."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        checked = handler(data)
        if isinstance(data, dict):
            checked._sent = data
        return checked

    @property
    def as_sent(self) -> dict[str, Any]:
        """The client's own object."""
        return self._sent


def _object_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters.get("type", "object") != "object":
        raise ValueError('the JSON schema of a function\'s parameters has "type": "object"')
    return parameters


class Function(_Kept):
    """What a tool does; without parameters it takes none."""

    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_object_schema)] | None = None
    strict: bool | None = None


class Tool(_Kept):
    """The only kind of tool that these models call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Closed):
    """The name of one of the tools."""

    name: FunctionName


class NamedTool(Closed):
    """The tool to call."""

    type: Literal["function"]
    function: NamedFunction


def _known_choice(value: Any) -> Any:
    named = isinstance(value, dict) and value.get("type") == "function"
    if not named and not (isinstance(value, str) and value in ("none", "auto", "required")):
        raise ValueError(f"allowed values are {_CHOICES}")
    return value


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_known_choice)
]


def refuse_tool_choice(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raise ApiError where `choice` asks for a call of what is not there."""
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise ApiError("tool_choice: only allowed with tools", param="tool_choice")
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ApiError(
            f"tool_choice: no function has the name {choice.function.name}; "
            f"allowed values: {', '.join(names)}",
            param="tool_choice",
        )


class CalledFunction(BaseModel):
    """A call of an earlier turn; OpenAI's `arguments` are JSON in a string."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any]


class ToolCall(BaseModel):
    """A call of an earlier assistant turn."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As Transformers' templates expect it: arguments are an object where they can be.

        Text that is no JSON object, such as that of a call that was cut, stays a string.
        """
        arguments = self.function.arguments
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


def _parsed(text: str) -> str | dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    # Python may just manage to read what nobody after it can write again.
    if not isinstance(value, dict) or is_deep(value):
        return text
    try:
        refuse_surrogates(value)
    except ApiError:
        return text
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
