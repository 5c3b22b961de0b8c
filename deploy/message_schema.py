"""The turns of a chat as requests bring them, and as chat templates expect them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.tool_schema import ToolCall


class TextPart(BaseModel):
    """The only kind of content part that these models read."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; fields beyond role and content reach the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    # The first bad entry ends the check, as everywhere where lists may be long.
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _fits_role(self) -> Message:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id: required with the role tool")
        if self.role != "assistant" and self.tool_calls:
            raise ValueError("tool_calls: allowed is the role assistant")
        return self

    @property
    def unread_fields(self) -> list[str]:
        """Fields of content parts that reach no template: their text is joined."""
        parts = self.content if isinstance(self.content, list) else []
        return [f"content.{key}" for part in parts for key in part.model_extra or ()]

    def for_template(self) -> dict[str, Any]:
        """The turn as chat templates expect it: content parts joined by line breaks."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        turn = {"role": self.role, "content": content, **(self.model_extra or {})}
        if self.tool_calls:
            # Published templates look into the text even where there are only calls.
            turn["content"] = content or ""
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            turn["reasoning_content"] = self.reasoning_content
        return turn
