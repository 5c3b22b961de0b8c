"""The arithmetic of the comparison: rates, bytes of touched weights, targets."""

from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.mid_checkpoints import CONFIGS, write_checkpoint
from benchmarks.peers.bandwidth import decode_bytes, expected_experts, weight_sizes
from benchmarks.peers.rightness import judge
from benchmarks.peers.timings import figures, percentile
from benchmarks.peers.verdicts import decode_verdict, prefill_verdict, tiny_verdicts


def test_figures():
    """Two requests, one of which starts later: its wait is prefill, what follows is decode."""
    found = figures([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0]], prompt=10)
    assert found.prefill == pytest.approx(2 * 10 / 2.0)
    assert found.decode == pytest.approx(4 / 3.0)
    assert found.first_token_p50 == pytest.approx(1.5)
    assert found.inter_token_p50 == pytest.approx(1.0)
    assert found.inter_token_p99 == pytest.approx(2.0)


def test_percentile():
    assert percentile([3.0, 1.0, 2.0, 4.0], 50) == 2.0
    assert percentile(list(range(1, 101)), 99) == 99
    assert percentile([], 50) == 0.0


def test_expected_experts_is_the_mean_over_all_draws():
    choices = list(itertools.combinations(range(4), 2))
    pairs = list(itertools.product(choices, repeat=2))
    mean = sum(len(set(one) | set(other)) for one, other in pairs) / len(pairs)
    assert expected_experts(4, 2, 2) == pytest.approx(mean)


@pytest.mark.parametrize("family", sorted(CONFIGS["tiny"]))
def test_active_parameters(family, tmp_path):
    """What a token needs: everything but its embedding table and the experts it does not take."""
    from safetensors import safe_open

    parameters = write_checkpoint("tiny", family, tmp_path)
    raw = CONFIGS["tiny"][family]
    sizes = weight_sizes(raw, parameters)
    active = 0.0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            count = math.prod(file.get_slice(name).get_shape())
            if "experts" in name:
                count *= sizes["per_token"] / sizes["experts"]
            active += 0 if "embed" in name or "wte" in name else count
    assert decode_bytes(sizes, sizes["per_token"]) == pytest.approx(2 * active)


def test_rightness():
    assert judge([[-1.0, -2.0]], [[-1.001, -2.0]]).state == "right"
    assert judge([[-1.0] * 5], [[-1.0] * 4 + [-1.2]]).state == "nearly"
    assert judge([[-1.0, -2.0]], [[-1.1, -2.2]]).state == "wrong"
    assert judge([[math.nan]], [[-1.0]]).state == "wrong"


def test_decode_target():
    """The nearer of two goals, and never behind a peer, right or not."""
    rates = {"transformers": 20.0, "llamacpp": 40.0}
    assert decode_verdict("", 1, 52.0, rates, rates, 100.0).target == pytest.approx(52.0)
    assert decode_verdict("", 1, 52.0, rates, rates, 50.0).target == pytest.approx(42.5)
    assert decode_verdict("", 32, 52.0, rates, rates, 50.0).target == pytest.approx(40.0)
    fast = {**rates, "vllm": 60.0}
    short = decode_verdict("", 1, 52.0, rates, fast, 100.0)
    assert short.target == 60.0
    assert not short.is_met
    assert "vllm" in short.line()


def test_other_targets():
    assert prefill_verdict("", "dbrx", 10.0, {"vllm": 9.0, "llamacpp": 2.0}).target == 9.0
    assert prefill_verdict("", "jamba", 10.0, {"llamacpp": 3.0}).target == 9.0
    targets = [verdict.target for verdict in tiny_verdicts("", 1.0, {"transformers": 2.0})]
    assert targets == [6.0]
