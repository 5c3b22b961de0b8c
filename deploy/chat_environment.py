"""The sandbox in which chat templates run: what Transformers lets them name, and their limits."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_CALLS_PER_LOOK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one rendering may take: seconds of its own thread's CPU time, and characters."""

    cpu_s: float = 10.0
    characters: int = 2**25


class Budget:
    """Counts down one rendering's limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._until = time.thread_time() + limits.cpu_s
        self._characters = limits.characters
        self._calls = 0

    def tick(self) -> None:
        """One call or one turn of a loop. Raises TemplateError when the time is up."""
        self._calls += 1
        if self._calls % _CALLS_PER_LOOK == 0 and time.thread_time() > self._until:
            raise TemplateError(f"it takes longer than {self._limits.cpu_s:g} s")

    def write(self, piece: str) -> None:
        """One piece of text. Raises TemplateError when it is too much."""
        self.tick()
        self._characters -= len(piece)
        if self._characters < 0:
            raise TemplateError(f"it writes more than {self._limits.characters} characters")


_budget: ContextVar[Budget] = ContextVar("budget of the rendering in this thread")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training: its text stays as it is.

    A call block as in Transformers, so that variables set inside are unknown outside.
    """

    tags = {"generation"}  # noqa: RUF012 (an instance variable to Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Turn(Extension):
    """A call in front of every turn of a loop; the sandbox counts calls."""

    def add_to(self, loop: nodes.For) -> None:
        """Have the loop's body begin with it."""
        call = self.call_method("_turn", lineno=loop.lineno)
        loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))

    def _turn(self) -> None:
        return None


class _Sandbox(ImmutableSandboxedEnvironment):
    """As in Transformers' chat_template_utils, so that templates render alike."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, _Turn, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    # Positional, as the variables of a call may have any name.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.get().tick()
        return super().call(__context, __obj, *args, **kwargs)


class CompiledTemplate:
    """One template's code, and the names that it reads, in whichever branch."""

    def __init__(self, source: str) -> None:
        environment = _Sandbox()
        tree = environment.parse(source)
        self.reads = frozenset(meta.find_undeclared_variables(tree))
        turn = environment.extensions[_Turn.identifier]
        assert isinstance(turn, _Turn)
        for loop in list(tree.find_all(nodes.For)):
            turn.add_to(loop)
        code = environment.compile(tree)
        self._template = Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, Any], limits: Limits) -> str:
        """Raises whatever the template's author wrote, and TemplateError beyond the limits."""
        budget = Budget(limits)
        token = _budget.set(budget)
        pieces: list[str] = []
        try:
            for piece in self._template.generate(variables):
                budget.write(piece)
                pieces.append(piece)
        finally:
            _budget.reset(token)
        return "".join(pieces)


@lru_cache(maxsize=32)
def compiled(source: str) -> CompiledTemplate:
    """Compiling takes milliseconds, and requests repeat. Raises any error of Jinja or Python."""
    return CompiledTemplate(source)


def template_line(error: BaseException) -> int | None:
    """The line of the template at which an error arose, counted from 1."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    walked = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in walked if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else None


class _Dict:
    """`dict` in templates: the two uses it has there, and no way to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's own, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
