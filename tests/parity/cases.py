"""The numbered cases of the parity suite: what each one guards against, and where it is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])

NUM_CASES = 65


@dataclass(frozen=True)
class Case:
    """One test function of the suite."""

    number: int
    family: str
    title: str
    test: str


def case(number: int, family: str, title: str) -> Callable[[Test], Test]:
    """Mark a test function as (a part of) case `number`; a case may have several functions."""
    assert 1 <= number <= NUM_CASES, number

    def mark(test: Test) -> Test:
        found = [*getattr(test, "parity_cases", ())]
        where = f"tests/parity/{test.__module__.rsplit('.', 1)[-1]}.py::{test.__name__}"
        found.append(Case(number, family, title, where))
        test.parity_cases = tuple(found)  # type: ignore[attr-defined]
        return test

    return mark


def cases_of(module: ModuleType) -> list[Case]:
    """Every case that a test module holds, by number."""
    found = [c for value in vars(module).values() for c in getattr(value, "parity_cases", ())]
    return sorted(found, key=lambda c: (c.number, c.test))
