"""What goes wrong in a template: the caller is told where; nothing runs for ever or breaks out."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from deploy.chat import ChatTemplate, ChatTemplateError
from deploy.chat_environment import Limits
from deploy.openai_errors import ApiError
from deploy.text_threads import TextThreads

CHAT = [{"role": "user", "content": "Hi"}]


def refusal(source: str, **limits: Any) -> ApiError:
    template = ChatTemplate(source, {}, limits=Limits(**limits) if limits else None)
    with pytest.raises(ApiError) as error:
        template.render(CHAT)
    assert error.value.status == 400
    assert error.value.code == "chat_template_error"
    assert error.value.param == "messages"
    return error.value


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        ("a\n{{ raise_exception('only user turns') }}", 2, "only user turns"),
        ("{% for m in messages %}\n\n{{ m.content + 1 }}{% endfor %}", 3, "TypeError"),
        ("\n\n\n{{ nothing.at_all }}", 4, "'nothing' is undefined"),
        ("{% macro f(x) %}\n{{ x.a.b }}\n{% endmacro %}\n{{ f({}) }}", 2, "no attribute 'a'"),
        ("x\n{{ ''.__class__.__mro__ }}", 2, "unsafe"),
        ("{{ messages.append(1) }}", 1, "unsafe"),
        ("{{ dict.mro() }}", 1, "no attribute 'mro'"),
        ("{% set n = namespace(__class__=1) %}", 1, "underscore"),
        ("{% set n = namespace() %}\n{% set n._x = 1 %}", 2, "underscore"),
        ("{% include 'other' %}", 1, "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 1, "RecursionError"),
    ],
)
def test_errors_name_the_line(source: str, line: int, words: str) -> None:
    message = refusal(source).message
    assert f"at line {line}: " in message
    assert words in message


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(ChatTemplateError, match=r"does not compile at line 3: "):
        ChatTemplate("a\nb\n{% if %}", {})


def test_what_a_template_says_is_cut() -> None:
    assert len(refusal("{{ raise_exception('x' * 100000) }}").message) < 700


# Loops and calls of every kind; each would take hours.
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% continue %}{% endfor %}"
        "{% continue %}{% endfor %}",
        "{% for a in [[[[]]]] * 99999 recursive %}{{ loop(range(99999) | list) }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(source: str) -> None:
    assert "longer than 0.05 s" in refusal(source, cpu_s=0.05).message


def test_a_template_that_writes_without_end_is_ended() -> None:
    source = "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"
    assert "more than 50000 characters" in refusal(source, characters=50_000).message


def test_loops_count_without_changing_what_they_say() -> None:
    source = (
        "{% for a in [1, 2, 3] if a != 2 %}{{ loop.index }}{{ loop.last }}{{ a }}"
        "{% else %}none{% endfor %}{% for a in [] %}{% else %}empty{% endfor %}"
    )
    assert ChatTemplate(source, {}).render(CHAT) == "1False12True3empty"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "chat_template"]
)
def test_variables_cannot_replace_fields(name: str) -> None:
    with pytest.raises(ApiError, match=name) as error:
        ChatTemplate("x", {}).render(CHAT, variables={name: 1})
    assert error.value.param == "chat_template_kwargs"


async def test_waiting_requests_pile_up_no_threads() -> None:
    threads = TextThreads(2)
    gate = threading.Event()
    ran: list[int] = []

    def work(number: int) -> int:
        gate.wait()
        ran.append(number)
        return number

    before = threading.active_count()
    waiting = [asyncio.create_task(threads.run(work, number)) for number in range(300)]
    try:
        await asyncio.sleep(0.05)
        assert threading.active_count() - before <= 2
        # Clients that leave take their place in the queue with them.
        for task in waiting[10:]:
            task.cancel()
        await asyncio.gather(*waiting[10:], return_exceptions=True)
    finally:
        gate.set()
    assert await asyncio.gather(*waiting[:10]) == list(range(10))
    assert await threads.run(len, "abc") == 3
    assert sorted(ran) == list(range(10))
