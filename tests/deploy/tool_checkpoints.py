"""Served models whose tokenizers and templates know tools, made from a nano checkpoint.

The templates have the same structure as those that the publishers ship, cut to what tests look at.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from deploy.demo import nano_checkpoint
from deploy.served_model import ServedModel, load_served_model

MAX_MODEL_LEN = 4096
_MARKERS_FROM = 504

JAMBA_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}{{- '<|bom|><|system|> ' -}}
{%- for tool in tools -%}{{- tool.function | tojson -}}{%- endfor -%}{{- '<|eom|>' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|bom|><|' + message.role + '|> ' + (message.content or '') -}}
{%- if message.tool_calls -%}
{{- '<tool_calls>[\\n' -}}
{%- for call in message.tool_calls -%}
{%- set arguments = call.function.arguments -%}
{%- if arguments is not string -%}{%- set arguments = arguments | tojson -%}{%- endif -%}
{{- '{"name": "' + call.function.name + '", "arguments": ' + arguments + '}' -}}
{%- if not loop.last -%}{{- ',\\n' -}}{%- endif -%}
{%- endfor -%}
{{- '\\n]</tool_calls>' -}}
{%- endif -%}
{{- '<|eom|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|bom|><|assistant|>' -}}{%- endif -%}
"""

HERMES_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}{{- '<|system|>\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}{{- '\\n</tools>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set content = message.content -%}
{%- if message.reasoning_content and not content.startswith('<think>') -%}
{%- set content = '<think>' + message.reasoning_content + '</think>' + content -%}
{%- endif -%}
{{- '<|assistant|>\\n' + content -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{%- elif message.role == 'tool' -%}
{{- '<|user|>\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- else -%}
{{- '<|' + message.role + '|>\\n' + message.content -}}
{%- endif -%}
{{- '<|eom|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n<think>\\n' -}}{%- endif -%}
"""
_MARKERS = {
    "jamba": (JAMBA_TEMPLATE, ("<tool_calls>", "</tool_calls>")),
    "hermes": (HERMES_TEMPLATE, ("<tool_call>", "</tool_call>", "<think>", "</think>")),
}


def checkpoint(folder: Path, form: str, *, special: bool = True) -> Path:
    """A copy of nano-jamba whose template writes calls in `form`, its markers special tokens."""
    template, markers = _MARKERS[form]
    copied = folder / form
    shutil.copytree(nano_checkpoint("nano-jamba"), copied)
    (copied / "chat_template.jinja").write_text(template)
    if not special:
        return copied
    file = copied / "tokenizer.json"
    config: dict[str, Any] = json.loads(file.read_text())
    for token_id, text in enumerate(markers, start=_MARKERS_FROM):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        # Without a place in the vocabulary it would get an id that another token has.
        config["model"]["vocab"][text] = token_id
        config["added_tokens"].append({"id": token_id, "content": text, "special": True, **flags})
    file.write_text(json.dumps(config))
    return copied


def served(folder: Path, form: str, *, special: bool = True, **options: Any) -> ServedModel:
    """The same as the API sees it."""
    copied = checkpoint(folder, form, special=special)
    return load_served_model(f"tiny-{form}", str(copied), 512, MAX_MODEL_LEN, **options)
