"""Autoscaling in virtual time: how many requests are in time, for how many replica hours.

python -m benchmarks.autoscale                      # all traces, with the committed costs
python -m benchmarks.autoscale --traces steps --peak 4
python -m benchmarks.autoscale --costs FILE         # of `benchmarks.autoscale_costs` elsewhere
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.autoscale_replica import Costs
from benchmarks.autoscale_scalers import Tuning, ours, serve_default
from benchmarks.autoscale_search import Task, clairvoyant, least_seconds, tuned
from benchmarks.autoscale_simulation import Outcome, Simulation
from benchmarks.autoscale_traces import TRACES, Request
from deploy.scaling_policy import ScalingTargets

COSTS = Path(__file__).with_name("autoscale_costs.json")
FEWER, NEAR = 0.25, 0.15
"""The goals: so much less than Serve's default policy, so close to who knows the future."""
_EQUAL = 0.002
"""A rival may attain so much less and counts as equal."""


def compare(name: str, requests: Sequence[Request], args: argparse.Namespace) -> dict[str, Any]:
    """One trace's rows, printed and returned."""
    costs = Costs.read(args.costs)
    print(f"\n{name}: {len(requests)} requests", end=", ")
    print(f"{sum(r.prompt for r in requests) / len(requests):.0f} prompt and", end=" ")
    print(f"{sum(r.answer for r in requests) / len(requests):.0f} answer tokens on average")
    targets = ScalingTargets(ttft_s=args.ttft)
    mine = Simulation(costs, ours(targets, args.most)).run(requests)
    attained = mine.attained(args.ttft, args.token)
    task = Task(
        costs=costs,
        requests=requests,
        most=args.most,
        ttft_s=args.ttft,
        token_s=args.token,
        attain=attained - _EQUAL,
    )
    row("ours", mine, args)
    found = tuned(task, args.processes)
    result: dict[str, Any] = {"attained": attained, "ours": mine.replica_s, "serve": None}
    result["settings"] = [(*_values(tuning), seconds) for tuning, seconds in found.items()]
    if found:
        best = min(found, key=lambda tuning: found[tuning])
        result["serve"] = found[best]
        row("Serve, tuned for this trace", task.with_tuning(best), args, str(_values(best)))
    oracle = clairvoyant(task, args.processes)
    result["oracle"], result["least"] = oracle.replica_s, least_seconds(task)
    row("who knows the future", oracle, args)
    print(f"  {'no less is possible':28} {result['least'] / 3600:8.2f} h")
    return result


def row(label: str, outcome: Outcome, args: argparse.Namespace, note: str = "") -> None:
    """One policy's figures."""
    attained = outcome.attained(args.ttft, args.token)
    print(
        f"  {label:28} {outcome.replica_s / 3600:8.2f} h  {attained:7.2%} in time, "
        f"at most {outcome.most:2}, {outcome.changes:3} changes  {note}",
        flush=True,
    )


def verdicts(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """How each trace stands to the goals, and what one setting for all of them would cost."""
    print("\ntrace           of Serve's   above who knows the future")
    for name, result in results.items():
        share = result["ours"] / result["serve"] - 1 if result["serve"] else float("nan")
        above = result["ours"] / result["oracle"] - 1
        met = ("met" if share <= -FEWER else "missed", "met" if above <= NEAR else "missed")
        print(f"{name:14}  {share:+.1%} ({met[0]})   {above:+.1%} ({met[1]})")
    if len(results) > 1:
        one_setting(results, args)


def one_setting(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Serve's default policy with the one setting that attains enough on every trace."""
    highest = [
        {tuple(each[1:4]): each[0] for each in result["settings"]} for result in results.values()
    ]
    costs, best, each_s = Costs.read(args.costs), None, {}
    for delays in set.intersection(*map(set, highest)):
        target = min(found[delays] for found in highest)
        task_s = {}
        for name in results:
            requests = TRACES[name](args.peak, args.seed)
            scaler = serve_default(Tuning(target, *delays), args.most)
            task_s[name] = Simulation(costs, scaler).run(requests).replica_s
        if best is None or sum(task_s.values()) < sum(each_s.values()):
            best, each_s = (target, *delays), task_s
    print(f"Serve with one setting {best}:", end=" ")
    for name, seconds in each_s.items():
        share = results[name]["ours"] / seconds - 1
        print(f"{name} {seconds / 3600:.2f} h (ours {share:+.1%})", end="; ")
    total = sum(result["ours"] for result in results.values()) / sum(each_s.values()) - 1
    print(f"all {total:+.1%}")


def _values(tuning: Tuning) -> tuple[float, float, float, float]:
    return (
        tuning.target_ongoing_requests,
        tuning.upscale_delay_s,
        tuning.downscale_delay_s,
        tuning.look_back_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", nargs="+", default=list(TRACES), choices=list(TRACES))
    parser.add_argument("--peak", type=float, default=8.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most", type=int, default=32, help="replicas")
    parser.add_argument("--ttft", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--token", type=float, default=0.15, help="seconds between tokens, average")
    parser.add_argument("--costs", type=Path, default=COSTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, help="file in which traces are gathered")
    args = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    results: dict[str, dict[str, Any]] = {}
    if args.results and args.results.exists():
        results = json.loads(args.results.read_text(encoding="utf-8"))
    for name in args.traces:
        began = time.monotonic()
        results[name] = compare(name, TRACES[name](args.peak, args.seed), args)
        print(f"  ({time.monotonic() - began:.0f} s)")
        if args.results:
            args.results.write_text(json.dumps(results) + "\n", encoding="utf-8")
    verdicts(results, args)


if __name__ == "__main__":
    main()
