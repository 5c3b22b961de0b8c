"""What the ingress knows of a checkpoint: text files only, never weights."""

from __future__ import annotations

import reprlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.chat import DEFAULT, WITH_TOOLS, ChatTemplate, ChatTemplates
from deploy.chat_files import load_chat_templates
from deploy.json_file import read_json_object
from deploy.openai_errors import ApiError
from deploy.reasoning import choose_reasoning
from deploy.tokenizer import TextTokenizer, load_tokenizer
from deploy.tool_formats import choose_format

_INT64_END = 2**63
"""Token ids and `top_k` travel to the engine as 64-bit integers."""
# What Transformers' `generate` reads and this server does not, with the value that does nothing;
# null and empty lists do nothing either.
_NOT_HONOURED: Mapping[str, object] = {
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "stop_strings": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_new_tokens": 0,
    "min_length": 0,
    "max_time": None,
    "num_beams": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "token_healing": False,
    "watermarking_config": None,
}
_NOT_HONOURED_IN_SAMPLING: Mapping[str, object] = {
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """From generation_config.json, which wins over config.json; OpenAI's where both are silent."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model as the API shows it. `tokenizer` and `template` are None where there is none."""

    name: str
    path: str
    vocab_size: int
    max_model_len: int
    tokenizer: TextTokenizer | None
    template: ChatTemplates | None
    defaults: SamplingDefaults
    warnings: tuple[str, ...] = ()
    asked_tool_call_parser: str = "auto"
    asked_reasoning_parser: str = "auto"
    trust_request_chat_template: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tool_call_parser(self) -> str:
        """By the option and the chat template. Raises ValueError where the option cannot work."""
        template = self._template_with_tools
        source, reads = (None, ()) if template is None else (template.source, template.reads)
        return choose_format(self.asked_tool_call_parser, source, reads)

    @property
    def reasoning_parser(self) -> str:
        """By the option and the chat template."""
        template = self._template_with_tools
        source = None if template is None else template.source
        return choose_reasoning(self.asked_reasoning_parser, source)

    @property
    def _template_with_tools(self) -> ChatTemplate | None:
        if self.template is None:
            return None
        own = self.template.named(WITH_TOOLS) or self.template.named(DEFAULT)
        return None if own is None else own.choose(None)

    def need_tokenizer(self, param: str) -> TextTokenizer:
        """Raises ApiError 400 `tokenizer_missing`."""
        if self.tokenizer is None:
            raise ApiError(
                f"{param}: this checkpoint has no tokenizer; token ids are accepted instead of "
                "text, as the prompt of /v1/completions or the input of /v1/classify",
                param=param,
                code="tokenizer_missing",
            )
        return self.tokenizer

    def need_template(self, given: str | None = None) -> ChatTemplates:
        """`given` is what a request wants: a template's name or, where that is trusted, its text.

        Raises ApiError 400.
        """
        named = None if given is None or self.template is None else self.template.named(given)
        if given is not None and named is None:
            return self._written(given)
        if self.template is None or not self.template.names:
            raise ApiError(
                "messages: this checkpoint has no chat template; use /v1/completions",
                param="messages",
                code="chat_template_missing",
            )
        return named or self.template

    def _written(self, source: str) -> ChatTemplates:
        """The template whose text a request brings."""
        templates = self.template or ChatTemplates({}, {})
        if self.trust_request_chat_template:
            return templates.written(source)
        names = templates.names
        allowed = f"allowed values: {', '.join(names)}" if names else "there is none to choose"
        raise ApiError(
            "chat_template: a request's own template is run only by a server started with "
            f"--trust-request-chat-template; {allowed}",
            param="chat_template",
            code="chat_template_not_trusted",
        )


def load_served_model(
    name: str,
    path: str,
    vocab_size: int,
    max_model_len: int,
    *,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    chat_template: str | None = None,
    trust_request_chat_template: bool = False,
) -> ServedModel:
    """Read tokenizer, chat template and generation defaults. Raises ValueError.

    The text `chat_template` takes the place of the checkpoint's own templates.
    """
    folder = Path(path)
    tokenizer, warnings = load_tokenizer(folder)
    templates, more = load_chat_templates(folder, chat_template)
    defaults, still_more = load_defaults(folder, tokenizer)
    defaults, unknown = _in_vocabulary(defaults, vocab_size)
    return ServedModel(
        name=name,
        path=path,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        tokenizer=tokenizer,
        # Without a name they still know the special tokens, for the templates that requests bring.
        template=templates if templates.names or trust_request_chat_template else None,
        defaults=defaults,
        warnings=(*warnings, *more, *still_more, *unknown),
        asked_tool_call_parser=tool_call_parser,
        asked_reasoning_parser=reasoning_parser,
        trust_request_chat_template=trust_request_chat_template,
    )


def load_defaults(
    folder: Path, tokenizer: TextTokenizer | None
) -> tuple[SamplingDefaults, list[str]]:
    """Sampling defaults and warnings about entries that are not honoured. Raises ValueError.

    generation_config.json, where it says anything, is alone in saying it: its end-of-sequence
    tokens are not joined with config.json's, also when it was derived from that file.
    """
    file = folder / "generation_config.json"
    generation = read_json_object(file)
    eos = _token_ids(file, generation) or _token_ids(
        folder / "config.json", read_json_object(folder / "config.json")
    )
    eos = eos or _eos_of_tokenizer(folder, tokenizer)
    warnings = [] if eos else ["no end-of-sequence token is declared: answers end at max_tokens"]
    warnings += _not_honoured(file, generation)
    penalty = _number(file, generation, "repetition_penalty", 1.0, above=0.0)
    do_sample = generation.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise ValueError(f"{file}: do_sample: must be true or false, not {reprlib.repr(do_sample)}")
    # do_sample=false makes Transformers ignore what follows, so it does here.
    chosen = {} if do_sample is False else generation
    return (
        SamplingDefaults(
            eos_token_ids=eos,
            repetition_penalty=penalty,
            temperature=_number(file, chosen, "temperature", 1.0),
            top_p=_number(file, chosen, "top_p", 1.0, above=0.0, most=1.0),
            top_k=_top_k(file, chosen),
            min_p=_number(file, chosen, "min_p", 0.0, most=1.0),
        ),
        warnings,
    )


def _in_vocabulary(
    defaults: SamplingDefaults, vocab_size: int
) -> tuple[SamplingDefaults, list[str]]:
    """Without the end-of-sequence tokens that the model cannot answer, and warnings of them."""
    known = tuple(i for i in defaults.eos_token_ids if i < vocab_size)
    unknown = [str(i) for i in defaults.eos_token_ids if i >= vocab_size]
    if not unknown:
        return defaults, []
    warning = (
        f"end-of-sequence token {', '.join(unknown)} is left out: the vocabulary has ids "
        f"0..{vocab_size - 1}" + ("" if known else ", so answers end at max_tokens")
    )
    return replace(defaults, eos_token_ids=known), [warning]


def _not_honoured(file: Path, generation: Mapping[str, Any]) -> list[str]:
    sampling = {} if generation.get("do_sample") is False else _NOT_HONOURED_IN_SAMPLING
    names = [
        key
        for key, neutral in {**_NOT_HONOURED, **sampling}.items()
        if generation.get(key) not in (None, neutral, "", [], {})
    ]
    return [f"{file.name}: not honoured: {', '.join(names)}"] if names else []


def _eos_of_tokenizer(folder: Path, tokenizer: TextTokenizer | None) -> tuple[int, ...]:
    token = read_json_object(folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if tokenizer is None or not isinstance(text, str):
        return ()
    found = tokenizer.token_id(text)
    return () if found is None else (found,)


def _token_ids(file: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_integer(v) and 0 <= v < _INT64_END for v in values):
        raise ValueError(
            f"{file}: eos_token_id: must be a token id or a list of token ids, "
            f"not {reprlib.repr(value)}"
        )
    return tuple(dict.fromkeys(values))


def _number(
    file: Path,
    config: Mapping[str, Any],
    key: str,
    default: float,
    *,
    above: float = -1.0,
    most: float = sys.float_info.max,
) -> float:
    """A number of at least 0, greater than `above` and at most `most`; null means `default`."""
    value = config.get(key)
    if value is None:
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or not above < value:
        low = "greater than 0" if above == 0 else "at least 0"
        high = "" if most == sys.float_info.max else f" and at most {most:g}"
        raise ValueError(
            f"{file}: {key}: must be a finite number {low}{high}, not {reprlib.repr(value)}"
        )
    return float(value)


def _top_k(file: Path, config: Mapping[str, Any]) -> int:
    """0 stands for all tokens; so does -1, as some tools write."""
    value = config.get("top_k")
    if value is None:
        return 0
    if not _is_integer(value) or not -1 <= value < _INT64_END:
        raise ValueError(
            f"{file}: top_k: must be an integer of at least 0 and below 2**63, "
            f"not {reprlib.repr(value)}"
        )
    return max(0, int(value))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
