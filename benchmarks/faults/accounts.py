"""What came of a run: verdicts, gaps and recovery times by kind of fault, as table and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.faults.gaps import (
    GapStatistics,
    Window,
    calm_windows,
    gaps_around,
    percentile,
    statistics_of,
)
from benchmarks.faults.injector import Happening
from benchmarks.faults.load import StreamRecord
from benchmarks.faults.verdicts import Verdict, count
from tests.groups import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRow:
    """All faults of one label; seconds, and milliseconds in the gaps."""

    label: str
    count: int
    unhealed: int
    recovery_p50: float
    recovery_most: float
    gap: GapStatistics
    added: GapStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One run of load and faults."""

    name: str
    verdicts: dict[str, int]
    wrong: tuple[str, ...]
    calm_gap: GapStatistics
    rows: tuple[FaultRow, ...]
    tokens_per_second: float
    leftovers: tuple[str, ...] = ()
    log: tuple[dict[str, Any], ...] = field(default=())

    @property
    def is_clean(self) -> bool:
        """Nothing failed, was truncated, changed, stayed unhealed or was left behind."""
        harmed = sum(n for verdict, n in self.verdicts.items() if verdict != Verdict.RIGHT)
        return not harmed and not self.leftovers and not any(row.unhealed for row in self.rows)


def draw_up(
    name: str,
    records: Sequence[StreamRecord],
    expected: Sequence[Answer],
    happenings: Sequence[Happening],
    calm: Window,
    seed: int,
) -> Account:
    """Judge every stream and sum up what was felt of each kind of fault."""
    judged = [(record, record.judge(expected[record.request_idx])) for record in records]
    wrong = [
        f"stream {i} (request {record.request_idx}): {j.verdict}: {j.why}"
        for i, (record, j) in enumerate(judged)
        if j.verdict is not Verdict.RIGHT
    ]
    labels = sorted({h.fault.label for h in happenings})
    rows = [
        _row(label, [h for h in happenings if h.fault.label == label], records, calm, seed)
        for label in labels
    ]
    within = [r for r in records if r.times]
    tokens = sum(len(r.times) for r in within)
    span = max((r.times[-1] for r in within), default=0.0) - min(
        (r.asked_at for r in within), default=0.0
    )
    return Account(
        name=name,
        verdicts=count(j for _, j in judged),
        wrong=tuple(wrong),
        calm_gap=_calm_gaps(records, calm),
        rows=tuple(rows),
        tokens_per_second=tokens / span if span else 0.0,
        log=tuple(_entry(h, calm[0]) for h in happenings),
    )


def _row(
    label: str,
    happenings: Sequence[Happening],
    records: Sequence[StreamRecord],
    calm: Window,
    seed: int,
) -> FaultRow:
    healed = [h.whole_at - h.at for h in happenings if h.whole_at is not None]
    windows = [h.window for h in happenings if h.window is not None]
    lengths = [end - start for start, end in windows]
    felt = statistics_of(gaps_around(records, windows))
    undisturbed = statistics_of(gaps_around(records, calm_windows(calm, lengths, seed)))
    return FaultRow(
        label=label,
        count=len(happenings),
        unhealed=len(happenings) - len(healed),
        recovery_p50=percentile(healed, 0.5),
        recovery_most=max(healed, default=float("nan")),
        gap=felt,
        added=felt.minus(undisturbed),
    )


def _calm_gaps(records: Sequence[StreamRecord], calm: Window) -> GapStatistics:
    """Every gap of the undisturbed time."""
    return statistics_of(
        [
            later - sooner
            for record in records
            for sooner, later in zip(record.times, record.times[1:], strict=False)
            if calm[0] <= sooner and later <= calm[1]
        ]
    )


def _entry(happening: Happening, begin: float) -> dict[str, Any]:
    whole = None if happening.whole_at is None else happening.whole_at - happening.at
    return {
        "time": round(happening.at - begin, 3),
        "fault": str(happening.fault),
        "role": happening.fault.role,
        "kind": happening.fault.kind,
        "recovery": whole,
    }


def as_json(account: Account) -> dict[str, Any]:
    """All of it."""
    return asdict(account)


def table(account: Account) -> str:
    """For people."""
    lines = [
        f"{account.name}: {sum(account.verdicts.values())} streams, "
        + ", ".join(f"{n} {verdict}" for verdict, n in account.verdicts.items())
        + f"; {account.tokens_per_second:.0f} tokens/s; undisturbed gap "
        + _three(account.calm_gap)
        + " ms (p50 / p99 / most)",
        "| fault | times | unhealed | whole after, s: p50 / most | longest gap, ms | added, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in account.rows:
        recovery = f"{row.recovery_p50:.2f} / {row.recovery_most:.2f}"
        lines.append(
            f"| {row.label} | {row.count} | {row.unhealed} | {recovery} "
            f"| {_three(row.gap)} | {_three(row.added)} |"
        )
    return "\n".join([*lines, *_shown(account.wrong), *account.leftovers])


def _three(gap: GapStatistics) -> str:
    return f"{gap.p50:.0f} / {gap.p99:.0f} / {gap.most:.0f}"


def _shown(wrong: Iterable[str], most: int = 20) -> list[str]:
    lines = list(wrong)
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])
