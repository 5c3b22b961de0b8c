"""Chat templates in the style of each family: every feature that the published ones use."""

from __future__ import annotations

from typing import Any

# Jamba 1.5: tools and documents in a system turn, calls as one JSON list.
JAMBA = """\
{%- set ns = namespace(system="", tools=false) -%}
{%- if messages and messages[0].role == "system" -%}
    {%- set ns.system = messages[0].content | trim -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- macro call_of(tool_call) -%}
    {%- set function = tool_call.function -%}
    {{- '{"name": "' ~ function.name ~ '", "arguments": ' -}}
    {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
    {{- "}" -}}
{%- endmacro -%}
{%- if ns.system or tools or documents -%}
<|bom|><|system|> {{ ns.system }}
{%- if tools %}

# Tools
<tool_definitions>
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{% endfor %}
</tool_definitions>
{%- set ns.tools = true -%}
{%- endif -%}
{%- for document in documents or [] %}

<document index="{{ loop.index }}">{{ document.title | default("untitled", true) | upper }}
{{ document["text"] }}</document>
{%- endfor -%}
<|eom|>
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == "tool" -%}
<|bom|><|tool|> {{ message.content }}<|eom|>
    {%- elif message.tool_calls is defined and message.tool_calls -%}
<|bom|><|assistant|> {% if message.content %}{{ message.content | trim }} {% endif -%}
<tool_calls>[{% for tool_call in message.tool_calls -%}
{{ call_of(tool_call) }}{{ ", " if not loop.last }}{% endfor %}]</tool_calls><|eom|>
    {%- else -%}
<|bom|><|{{ message.role }}|> {{ message.content }}<|eom|>
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|bom|><|assistant|>{% endif -%}
"""

# Hermes: one call per tag, results grouped, reasoning of the last turn kept.
HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{%- continue %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if reasoning and loop.index0 > ns.last %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string
                else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# DBRX: a default system turn with a date, turns that must alternate.
DBRX = """\
{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}
{% set system = messages[0]['content'] %}{% elif use_default_prompt | default(true) %}
{% set turns = messages %}{% set system = 'You know what happened before ' ~ strftime_now('%Y') %}
{% else %}{% set turns = messages %}{% set system = false %}{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('turns must alternate') }}
{% endif %}
{% if loop.first and system %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' -}}
{% if loop.last and add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% else %}
{{ eos_token }}{% endif %}
{% endfor %}
"""

# PhiMoE: as short as they come.
PHI = (
    "{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}"
    "{{ eos_token }}{% endif %}"
)

# What a template is shown, to the order of keys.
RAW = (
    "{% for m in messages %}{{ m | tojson }}{{ m.thinking }}{{ m.content }}{% endfor %}"
    "{{ tools | tojson }}"
)

FAMILY_TEMPLATES = {"raw": RAW, "jamba": JAMBA, "hermes": HERMES, "dbrx": DBRX, "phi": PHI}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like <there>, ünïcode too",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi\n\nthere "}],
    "system": [
        {"role": "system", "content": " Be <brief> & kind. "},
        {"role": "user", "content": "ünï😀"},
        {"role": "assistant", "content": " yes "},
        {"role": "user", "content": "more"},
    ],
    "tools": [
        {"role": "user", "content": "Weather in Bern and Rome?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I must ask.",
            "tool_calls": [CALL, {**CALL, "id": "call_2"}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 3}'},
        {"role": "tool", "tool_call_id": "call_2", "content": "21"},
    ],
    "reasoned": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."},
    ],
}
