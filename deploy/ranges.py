"""Numbers as people write them."""

from __future__ import annotations

from collections.abc import Sequence


def ranges_text(numbers: Sequence[int]) -> str:
    """Ascending numbers such as 0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
