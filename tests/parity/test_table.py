"""The suite is complete, and its page in docs/ is the suite's own."""

from __future__ import annotations

from pathlib import Path

from tests.parity.cases import NUM_CASES
from tests.parity.table import collect, table


def test_every_case_has_a_test() -> None:
    missing = set(range(1, NUM_CASES + 1)) - {c.number for c in collect()}
    assert not missing, f"cases without a test: {sorted(missing)}"


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "parity.md"
    assert page.read_text(encoding="utf-8") == table(), (
        "run: python -m tests.parity.table > docs/parity.md"
    )
