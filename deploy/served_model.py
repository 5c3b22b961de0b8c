"""What the ingress knows of a checkpoint: text files only, never weights."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.chat import ChatTemplate, load_chat_template
from deploy.openai_errors import ApiError
from deploy.tokenizer import TextTokenizer, load_tokenizer

log = logging.getLogger("conclave.ingress")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """From generation_config.json, which wins over config.json; OpenAI's where both are silent."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model as the API shows it. `tokenizer` and `template` are None where there is none."""

    name: str
    path: str
    vocab_size: int
    max_model_len: int
    tokenizer: TextTokenizer | None
    template: ChatTemplate | None
    defaults: SamplingDefaults
    warnings: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def need_tokenizer(self, param: str) -> TextTokenizer:
        """Raises ApiError 400 `tokenizer_missing`."""
        if self.tokenizer is None:
            raise ApiError(
                f"{param}: this checkpoint has no tokenizer; send a prompt of token ids "
                "to /v1/completions",
                param=param,
                code="tokenizer_missing",
            )
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        """Raises ApiError 400 `chat_template_missing`."""
        if self.template is None:
            raise ApiError(
                "messages: this checkpoint has no chat template; use /v1/completions",
                param="messages",
                code="chat_template_missing",
            )
        return self.template


def load_served_model(name: str, path: str, vocab_size: int, max_model_len: int) -> ServedModel:
    """Read tokenizer, chat template and generation defaults. Raises ValueError."""
    folder = Path(path)
    tokenizer, warnings = load_tokenizer(folder)
    template, more = load_chat_template(folder)
    defaults, still_more = load_defaults(folder, tokenizer)
    return ServedModel(
        name=name,
        path=path,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        tokenizer=tokenizer,
        template=template,
        defaults=defaults,
        warnings=(*warnings, *more, *still_more),
    )


def load_defaults(
    folder: Path, tokenizer: TextTokenizer | None
) -> tuple[SamplingDefaults, list[str]]:
    """Sampling defaults and warnings about entries that are not honoured. Raises ValueError."""
    generation = _read_json(folder / "generation_config.json")
    eos = _ids(generation.get("eos_token_id"))
    eos = eos or _ids(_read_json(folder / "config.json").get("eos_token_id"))
    eos = eos or _eos_of_tokenizer(folder, tokenizer)
    warnings = [] if eos else ["no end-of-sequence token is declared: answers end at max_tokens"]
    penalty = generation.get("repetition_penalty")
    if penalty not in (None, 1, 1.0):
        warnings.append(f"generation_config.json: repetition_penalty={penalty} is not applied yet")
    # do_sample=false makes Transformers ignore the rest, so it does here.
    chosen = {} if generation.get("do_sample") is False else generation
    return (
        SamplingDefaults(
            eos_token_ids=eos,
            temperature=_number(chosen, "temperature", 1.0),
            top_p=_number(chosen, "top_p", 1.0),
            top_k=int(_number(chosen, "top_k", 0)),
            min_p=_number(chosen, "min_p", 0.0),
        ),
        warnings,
    )


def _eos_of_tokenizer(folder: Path, tokenizer: TextTokenizer | None) -> tuple[int, ...]:
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if tokenizer is None or not isinstance(text, str):
        return ()
    found = tokenizer.token_id(text)
    return () if found is None else (found,)


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    return float(value) if isinstance(value, int | float) else default


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}
