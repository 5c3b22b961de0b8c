"""Requests of /tokenize and /detokenize, as vLLM names them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from deploy.message_schema import Message
from deploy.openai_errors import ApiError
from deploy.openai_schema import ApiRequest, TemplateFields, TokenIds, refuse_continuation
from deploy.tool_schema import MAX_TOOLS, Tool


class TokenizeRequest(TemplateFields):
    """POST /tokenize: the `prompt` of a completion, or a chat's `messages`."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    return_token_strs: bool = False
    add_special_tokens: bool | None = None
    """None: with a prompt, not with `messages`, whose template writes its own."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def check(self) -> None:
        """Raises ApiError for fields that do not go together."""
        if self.prompt is None and self.messages is None:
            raise ApiError("prompt: required, unless there are messages", param="prompt")
        if self.messages is not None and self.prompt is not None:
            raise ApiError("messages: not allowed together with prompt", param="messages")
        if self.messages is not None:
            refuse_continuation(self.continue_final_message, self.add_generation_prompt)
            return
        for name in ("tools", *TemplateFields.model_fields, "continue_final_message"):
            if name != "model" and getattr(self, name):
                raise ApiError(f"{name}: only allowed with messages", param=name)


class DetokenizeRequest(ApiRequest):
    """POST /detokenize."""

    tokens: TokenIds
