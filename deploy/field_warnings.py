"""What a request asked for and will not get: named in the answer's `warnings`."""

from __future__ import annotations

from deploy.openai_errors import cut
from deploy.openai_schema import ApiRequest, ChatRequest, GenerationRequest, TemplateFields
from deploy.served_model import ServedModel
from deploy.unsupported import without_effect

_MOST = 100
_MAX_NAME = 100


def field_warnings(model: ServedModel, request: ApiRequest) -> tuple[str, ...]:
    """One sentence for each field, or key of a field, that has no effect."""
    unknown = request.unknown_fields
    found = [f"unknown field {cut(name, _MAX_NAME)} has no effect" for name in unknown[:_MOST]]
    if len(unknown) > _MOST:
        found.append(f"{len(unknown) - _MOST} more unknown fields have no effect")
    found += without_effect(request.model_extra or {})
    if isinstance(request, GenerationRequest):
        options = request.stream_options
        if options is not None and options.include_obfuscation:
            found.append("stream_options.include_obfuscation has no effect: nothing is padded")
    if isinstance(request, ChatRequest):
        newer = request.max_completion_tokens
        if newer is not None and request.max_tokens not in (None, newer):
            found.append("max_tokens has no effect beside max_completion_tokens, its newer name")
    if isinstance(request, TemplateFields) and getattr(request, "messages", None):
        found += _unread(model, request)
    return tuple(found)


def _unread(model: ServedModel, request: TemplateFields) -> list[str]:
    """Variables that the chat template does not look at, in any branch."""
    templates = model.need_template(request.chat_template)
    reads = templates.choose(getattr(request, "tools", None) or None).reads
    given = {f"chat_template_kwargs.{name}": name for name in request.chat_template_kwargs or {}}
    given |= {name: name for name in ("documents", "reasoning_effort") if getattr(request, name)}
    unread = [field for field, name in given.items() if name not in reads]
    return [
        f"{cut(field, _MAX_NAME)} has no effect: the chat template does not read it"
        for field in unread[:_MOST]
    ]
