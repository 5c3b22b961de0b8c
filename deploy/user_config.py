"""What Serve's `user_config` may change of a running replica: no weight, no actor, no stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from deploy.admission import AdmissionLimits
from deploy.chat_files import load_chat_templates
from deploy.config import ConfigError, parse_options
from deploy.served_model import SamplingDefaults, ServedModel

_INT64_MOST = 2**63 - 1


class UserConfig(BaseModel):
    """Fields that are absent or null are as the checkpoint and the options have them.

    Ranges of sampling fields are those of requests.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False
    )

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT64_MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    max_waiting_seqs: Annotated[int, Field(ge=0, le=_INT64_MOST)] | None = None
    max_queue_seconds: Annotated[float, Field(gt=0, le=86400)] | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What requests are answered by; each takes them once, when it begins."""

    model: ServedModel
    limits: AdmissionLimits
    shown: Mapping[str, Any] = field(default_factory=dict)
    """What /version says of them."""


def parse_user_config(value: object) -> UserConfig:
    """Names, types and ranges. Raises ConfigError naming the field and what is allowed."""
    if not isinstance(value, dict):
        allowed = ", ".join(UserConfig.model_fields)
        raise ConfigError(f"user_config: allowed is a mapping of {allowed}")
    try:
        return parse_options(UserConfig, value)
    except ConfigError as error:
        raise ConfigError(f"user_config: {error}") from None


def changed_model(config: UserConfig, model: ServedModel) -> ServedModel:
    """`model` with the configured sampling defaults and template. Raises ConfigError.

    How answers are read (tool calls, reasoning) stays as it was chosen at the start.
    """
    changed = replace(model, defaults=_defaults(config, model.defaults))
    if config.chat_template is None:
        return changed
    try:
        templates, _ = load_chat_templates(Path(model.path), config.chat_template)
        changed = replace(changed, template=templates)
        _ = changed.tool_call_parser  # a parser that was asked for may not suit the template
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"user_config: chat_template: {reason}") from error
    return changed


def changed_limits(config: UserConfig, limits: AdmissionLimits) -> AdmissionLimits:
    """`limits` with the configured ones."""
    waiting, queue_s = config.max_waiting_seqs, config.max_queue_seconds
    return replace(
        limits,
        max_waiting=limits.max_waiting if waiting is None else waiting,
        max_queue_s=limits.max_queue_s if queue_s is None else queue_s,
    )


def apply(config: UserConfig, settings: Settings) -> Settings:
    """The settings of the options, changed. Reads small files. Raises ConfigError."""
    return Settings(
        model=changed_model(config, settings.model),
        limits=changed_limits(config, settings.limits),
        shown={"user_config": _shown(config)},
    )


def _shown(config: UserConfig) -> dict[str, Any]:
    """Of a template the hash, for it may be long."""
    fields = config.model_dump(exclude_none=True)
    if config.chat_template is not None:
        fields["chat_template"] = f"sha256:{sha256(config.chat_template.encode()).hexdigest()}"
    return fields


def _defaults(config: UserConfig, defaults: SamplingDefaults) -> SamplingDefaults:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    if "top_k" in given:  # -1 stands for all tokens too
        given["top_k"] = max(0, given["top_k"])
    return replace(defaults, **given)
