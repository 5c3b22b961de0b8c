"""Prints the table of parity cases: `python -m tests.parity.table > docs/parity.md`."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.parity.cases import Case, cases_of
from tests.parity.remedies import REMEDIES

_HEAD = """# Parity cases

Generated from the suite by `python -m tests.parity.table > docs/parity.md`; run it with
`pytest tests/parity -q`. The oracle of every case is one full, unpadded, uncached forward of
Transformers over a small random checkpoint in float32. Each case runs on the local executor and on
a pipeline of stage, dispatcher and expert workers with a random expert placement: packed with
others, in chunks cut at every position, and one token at a time, always with the same bits.

| case | family | what | tests |
|---|---|---|---|
"""
_REMEDIES = """
## Where Transformers is corrected

Every correction of the oracle is a named fixture. A test shows for each that Transformers without
it departs from the model's definition.

| fixture | why |
|---|---|
"""


def collect() -> list[Case]:
    """The cases of every test module in this folder."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    modules = [importlib.import_module(f"tests.parity.{name}") for name in names]
    return sorted((c for m in modules for c in cases_of(m)), key=lambda c: (c.number, c.test))


def table() -> str:
    """The page as Markdown."""
    rows = []
    for number in sorted({c.number for c in collect()}):
        found = [c for c in collect() if c.number == number]
        tests = "<br>".join(dict.fromkeys(f"`{c.test}`" for c in found))
        titles = "; ".join(dict.fromkeys(c.title for c in found))
        rows.append(f"| {number} | {found[0].family} | {titles} | {tests} |\n")
    remedies = [f"| `{name}` | {why} |\n" for name, why in REMEDIES.items()]
    return _HEAD + "".join(rows) + _REMEDIES + "".join(remedies)


if __name__ == "__main__":
    print(table(), end="")
