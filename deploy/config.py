"""The options of one served model, by the names of the command line, checked without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from deploy.backends import ATTENTION_ALIASES, missing_for_mamba_ssm
from deploy.http_options import HttpOptions, check_origin
from deploy.trace_options import TraceOptions, check_endpoint, missing_exporter
from models.kernels.choice import parse_choice
from shards.partition import LayerRanges, layer_ranges_text, parse_stage_layers
from shards.spec import Deadlines

_UNITS = {
    "": 1,
    "b": 1,
    **{unit + "b": 1000**power for power, unit in enumerate("kmgt", start=1)},
    **{unit + "ib": 1024**power for power, unit in enumerate("kmgt", start=1)},
}


class ConfigError(ValueError):
    """An option that cannot be served; the message is one sentence that names it."""


def parse_bytes(value: object) -> object:
    """`2GiB`, `512 MB` or a count of bytes → bytes; what is no text is left to the type check."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError("allowed values are sizes such as 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _cache_size(value: object) -> object:
    """`auto` is as good as not given."""
    try:
        return None if value == "auto" else parse_bytes(value)
    except ValueError:
        raise ValueError("allowed values are auto and sizes such as 512MiB or 2GiB") from None


def _layer_ranges(value: object) -> object:
    """`0-8,9-17`, or a list of such ranges."""
    if value is None:
        return value
    if isinstance(value, tuple) and all(isinstance(part, tuple) for part in value):
        value = layer_ranges_text(value)
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return parse_stage_layers(str(value))


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _header_text(key: str) -> str:
    """A key that clients can send: what stands at a header's ends is lost, the rest is ASCII."""
    if not re.fullmatch(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?", key):
        raise ValueError(
            "allowed are one or more printable ASCII characters without a space at either end"
        )
    return key


def _our_name(value: object) -> object:
    """Transformers' name of an attention implementation → ours."""
    return ATTENTION_ALIASES.get(value, value) if isinstance(value, str) else value


PositiveInt = Annotated[int, Field(ge=1)]
Options = TypeVar("Options", bound=BaseModel)


class ServeArgs(BaseModel):
    """What the user asked for; None means that `resolve` chooses."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    model: Annotated[str, Field(min_length=1)]
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stages: PositiveInt | None = None
    stage_layers: Annotated[LayerRanges | None, BeforeValidator(_layer_ranges)] = None
    expert_shards: Annotated[int, Field(ge=0)] | None = None
    expert_replicas: PositiveInt = 1
    nodes: PositiveInt | None = None
    executor: Literal["auto", "local", "pipeline"] = "auto"
    dispatch: Literal["actor", "direct"] = "actor"
    layout: Literal["auto", "colocated", "disaggregated"] = "auto"
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt = 32
    max_num_batched_tokens: PositiveInt = 2048
    kv_cache_memory: Annotated[PositiveInt | None, BeforeValidator(_cache_size)] = None
    block_size: PositiveInt = 16
    quantization: Literal["none", "int8", "int8-all"] = "none"
    kernels: str = "auto"
    attention_backend: Annotated[
        Literal["auto", "torch", "native", "flash_attn", "triton"], BeforeValidator(_our_name)
    ] = "auto"
    mamba_backend: Literal["auto", "torch", "native", "mamba_ssm", "triton"] = "auto"
    enable_prefix_caching: bool = True
    tool_call_parser: Literal["auto", "jamba", "hermes", "json", "none"] = "auto"
    reasoning_parser: Literal["auto", "think", "none"] = "auto"
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    trust_request_chat_template: bool = False
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: PositiveInt | None = None
    ttft_target: Annotated[float, Field(gt=0, le=3600)] = 2.0
    scale_down_delay: Annotated[float, Field(ge=0, le=86400)] = 60.0
    drain_timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0
    api_key: Annotated[
        tuple[Annotated[str, AfterValidator(_header_text)], ...], BeforeValidator(_as_list)
    ] = ()
    max_request_bytes: Annotated[PositiveInt, BeforeValidator(parse_bytes)] = 16 * 2**20
    body_timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0
    request_timeout: Annotated[float, Field(gt=0, le=86400)] | None = None
    max_queue_seconds: Annotated[float, Field(gt=0, le=86400)] = 120.0
    cors_origin: Annotated[
        tuple[Annotated[str, AfterValidator(check_origin)], ...], BeforeValidator(_as_list)
    ] = ()
    strict_requests: bool = False
    threads: PositiveInt | None = None
    warm_spare: bool | None = None
    cpus_per_actor: Annotated[float, Field(gt=0, le=1024)] = 0.1
    hang_deadline: Annotated[float, Field(ge=0.1, le=3600)] = 1.0
    step_deadline: Annotated[float, Field(ge=0.1)] = 300.0
    load_timeout: Annotated[float, Field(ge=1.0, le=86400)] = 1800.0
    recovery_timeout: Annotated[float, Field(ge=0)] = 120.0
    sse_keep_alive_seconds: Annotated[float, Field(gt=0, le=3600)] = 15.0
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: Annotated[str, AfterValidator(check_endpoint)] | None = None
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> ServeArgs:
        parse_choice(self.kernels)
        for key, allowed in _AVAILABLE.items():
            value = getattr(self, key)
            if value not in allowed:
                why = " (not available in this version)"
                if value == "mamba_ssm":
                    why = f" ({missing_for_mamba_ssm()})"
                raise ValueError(_refusal(key, value, allowed, why))
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas}: allowed values are min_replicas or more, "
                f"here {self.min_replicas}"
            )
        if self.step_deadline < self.hang_deadline:
            raise ValueError(
                f"step_deadline={self.step_deadline:g}: allowed values are hang_deadline or more, "
                f"here {self.hang_deadline:g}"
            )
        if self.otlp_endpoint is None and self.trace_sample_ratio is not None:
            raise ValueError(
                f"trace_sample_ratio={self.trace_sample_ratio:g}: allowed only with otlp_endpoint"
            )
        if self.otlp_endpoint is not None and (why := missing_exporter()):
            raise ValueError(f"otlp_endpoint={self.otlp_endpoint}: {why}")
        return self

    @property
    def deadlines(self) -> Deadlines:
        """The three that supervision knows."""
        return Deadlines(
            hang_s=self.hang_deadline,
            step_s=self.step_deadline,
            load_s=self.load_timeout,
            recovery_s=self.recovery_timeout,
        )

    @property
    def traces(self) -> TraceOptions | None:
        """Where traces go; None: nowhere."""
        if self.otlp_endpoint is None:
            return None
        ratio = 1.0 if self.trace_sample_ratio is None else self.trace_sample_ratio
        return TraceOptions(endpoint=self.otlp_endpoint, sample_ratio=ratio)

    @property
    def http(self) -> HttpOptions:
        """Those of the web server."""
        return HttpOptions(
            max_request_bytes=self.max_request_bytes,
            body_timeout_s=self.body_timeout,
            request_timeout_s=self.request_timeout,
            cors_origins=self.cors_origin,
        )


# Options that are known and typed, and whose other values cannot be served yet.
_AVAILABLE: dict[str, tuple[object, ...]] = {
    "device": ("auto", "cpu"),
    "layout": ("auto", "disaggregated"),
    "attention_backend": ("auto", "torch", "native"),
    "mamba_backend": ("auto", "torch", "native"),
}


def parse_args(options: Mapping[str, Any]) -> ServeArgs:
    """Check names, types and availability of options; values may be strings. Raises ConfigError."""
    return parse_options(ServeArgs, options)


def parse_options(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """The same for the options of any command. Raises ConfigError."""
    try:
        return kind(**{str(key): value for key, value in options.items()})
    except ValidationError as error:
        fields = kind.model_fields
        raise ConfigError(_sentence(error.errors(include_url=False)[0], fields)) from None


class Address(BaseModel):
    """Where the command line's own web server listens; elsewhere Serve's options say it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000


def take_address(options: Mapping[str, Any]) -> tuple[Address, dict[str, Any]]:
    """The address among the command line's options, and the others. Raises ConfigError."""
    mine = {key: options[key] for key in Address.model_fields if key in options}
    others = {key: value for key, value in options.items() if key not in mine}
    try:
        return Address(**mine), others
    except ValidationError as error:
        raise ConfigError(
            _sentence(error.errors(include_url=False)[0], Address.model_fields)
        ) from None


def _refusal(key: str, value: object, allowed: tuple[object, ...], why: str = "") -> str:
    shown = ", ".join(str(option).lower() if option is False else str(option) for option in allowed)
    text = str(value).lower() if isinstance(value, bool) else value
    return f"{key}={text}{why}: allowed values are {shown}"


# Pydantic's words for a wrong type or size, in ours.
_ALLOWED = {
    "int_parsing": "whole numbers",
    "int_type": "whole numbers",
    "int_from_float": "whole numbers",
    "finite_number": "numbers that are finite",
    "float_parsing": "numbers",
    "float_type": "numbers",
    "bool_parsing": "true, false",
    "bool_type": "true, false",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
}


def _sentence(error: ErrorDetails, fields: Mapping[str, FieldInfo]) -> str:
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"unknown option {key}: allowed options are {', '.join(fields)}"
    if error["type"] == "missing":
        return f"{key} is missing: allowed values are a checkpoint folder or a nano model's name"
    if error["type"] == "literal_error":
        return _refusal(key, error["input"], get_args(fields[key].annotation))
    if error["type"] in _ALLOWED:
        allowed = _ALLOWED[error["type"]].format(**error.get("ctx", {}))
        return f"{key}={error['input']}: allowed values are {allowed}"
    message = error["msg"].removeprefix("Value error, ")
    # A key is a secret, and what stands here ends up in logs.
    shown = key if key == "api_key" else f"{key}={error['input']!r}"
    return f"{shown}: {message[0].lower()}{message[1:]}"
