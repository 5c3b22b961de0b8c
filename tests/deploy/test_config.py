"""Options: what is refused, in one sentence that names the key, and what is chosen."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from deploy.config import ConfigError, parse_args
from deploy.demo import nano_checkpoint
from deploy.reservation import bundle_cpus
from deploy.resolve import ResolvedArgs, resolve
from shards.bundles import bundle_index
from shards.spec import Deadlines, Role, worker_specs
from tests.tiny import write_tiny


def resolved(**options: Any) -> ResolvedArgs:
    return resolve(parse_args({"model": "nano-jamba", **options}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modle": "x"}, ["modle", "max_model_len"]),
        ({"model": None}, ["model"]),
        ({"stages": 0}, ["stages", "1"]),
        ({"stages": "two"}, ["stages=two", "whole numbers"]),
        ({"stages": 9}, ["stages=9", "1..8"]),
        ({"stage_layers": "0-3,5-7"}, ["stage_layers='0-3,5-7'", "5-7 does not begin with 4"]),
        ({"stage_layers": "first"}, ["stage_layers='first'", "0-8,9-17"]),
        ({"stage_layers": {0: 3}}, ["stage_layers", "0-8,9-17"]),
        ({"stage_layers": "0-3,4-6"}, ["stage_layers=0-3,4-6", "end with layer 7"]),
        ({"stage_layers": "0-3,4-8"}, ["stage_layers=0-3,4-8", "end with layer 7"]),
        ({"stage_layers": "0-3,4-7", "stages": 3}, ["stages=3", "values are 2", "0-3,4-7"]),
        ({"stage_layers": "0-3,4-7", "executor": "local"}, ["stage_layers=2", "executor=local"]),
        ({"expert_shards": 0, "executor": "pipeline"}, ["expert_shards=0", "1..16"]),
        ({"expert_shards": 17}, ["expert_shards=17", "1..16"]),
        ({"expert_shards": 2, "expert_replicas": 3}, ["expert_replicas=3", "1..2"]),
        (
            {"expert_shards": 2, "max_num_batched_tokens": 10**8},
            ["max_num_batched_tokens=100000000", "at most", "1 GiB"],
        ),
        ({"executor": "local", "stages": 2}, ["stages=2", "executor=local"]),
        ({"executor": "local", "expert_shards": 2}, ["expert_shards=2", "executor=local"]),
        ({"nodes": 0}, ["nodes=0", "1 or more"]),
        ({"nodes": 2}, ["nodes=2", "1..1"]),
        ({"nodes": 5, "stages": 2, "expert_shards": 4}, ["nodes=5", "1..4"]),
        ({"executor": "distributed"}, ["executor=distributed", "pipeline"]),
        ({"dispatch": "x"}, ["dispatch=x", "direct"]),
        ({"dtype": "int4"}, ["dtype=int4", "bfloat16"]),
        ({"device": "cuda"}, ["device=cuda", "not available in this version", "cpu"]),
        ({"layout": "colocated"}, ["layout=colocated", "not available", "disaggregated"]),
        ({"quantization": "int4"}, ["quantization=int4", "none, int8, int8-all"]),
        ({"attention_backend": "triton"}, ["attention_backend=triton", "torch"]),
        ({"attention_backend": "flash_attention_2"}, ["attention_backend=flash_attn", "torch"]),
        ({"mamba_backend": "triton"}, ["mamba_backend=triton", "not available", "torch"]),
        ({"mamba_backend": "mamba_ssm"}, ["mamba_backend=mamba_ssm", "CPUs only", "torch"]),
        ({"max_model_len": 513}, ["max_model_len=513", "1..512"]),
        ({"kv_cache_memory": "2 parsecs"}, ["kv_cache_memory", "2GiB"]),
        ({"kv_cache_memory": "1KiB"}, ["kv_cache_memory=1024", "max_model_len=512", " or more"]),
        ({"kv_cache_memory": 0}, ["kv_cache_memory=0", "1 or more"]),
        ({"kv_cache_memory": "most"}, ["kv_cache_memory='most'", "auto", "2GiB"]),
        ({"min_replicas": 3, "max_replicas": 2}, ["max_replicas=2", "3"]),
        ({"cpus_per_actor": 0}, ["cpus_per_actor"]),
        ({"api_key": [""]}, ["api_key", "printable ASCII"]),
        ({"threads": "0"}, ["threads"]),
        ({"hang_deadline": "0.01"}, ["hang_deadline=0.01", "0.1 or more"]),
        ({"hang_deadline": 2, "step_deadline": 1}, ["step_deadline=1", "hang_deadline", "2"]),
        ({"step_deadline": "inf"}, ["step_deadline=inf", "finite"]),
        ({"max_queue_seconds": "nan"}, ["max_queue_seconds=nan", "numbers that are finite"]),
        ({"max_queue_seconds": "inf"}, ["max_queue_seconds=inf", "numbers that are finite"]),
        ({"recovery_timeout": "inf"}, ["recovery_timeout=inf", "numbers that are finite"]),
        ({"body_timeout": "nan"}, ["body_timeout=nan", "numbers that are finite"]),
        ({"load_timeout": "0"}, ["load_timeout=0", "1.0 or more"]),
        ({"recovery_timeout": "-1"}, ["recovery_timeout=-1", "0 or more"]),
        ({"recovery_timeout": "soon"}, ["recovery_timeout=soon", "numbers"]),
    ],
)
def test_refusals_name_the_key(options: dict[str, Any], words: list[str]) -> None:
    given = {"model": "nano-jamba", **options}
    with pytest.raises(ConfigError) as error:
        resolve(parse_args({key: value for key, value in given.items() if value is not None}))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "key", ["", " ", " k1", "k1 ", "k1\n", "\tk1", "k\n1", "ключ", "k\xe9", "k\0"]
)
def test_keys_that_no_header_carries(key: str) -> None:
    with pytest.raises(ConfigError, match=r"api_key: .*printable ASCII") as error:
        parse_args({"model": "m", "api_key": ["good", key]})
    if key.strip():
        assert key.strip() not in str(error.value), "a key is a secret"
    assert parse_args({"model": "m", "api_key": "k 1~!"}).api_key == ("k 1~!",)


def test_deadlines_reach_the_group() -> None:
    args = {
        "hang_deadline": "0.5",
        "step_deadline": "60",
        "load_timeout": "90",
        "recovery_timeout": "7.5",
    }
    spec = resolve(parse_args({"model": "nano-jamba", **args})).spec
    assert spec.deadlines == Deadlines(hang_s=0.5, step_s=60.0, load_s=90.0, recovery_s=7.5)
    assert resolve(parse_args({"model": "nano-jamba"})).spec.deadlines == Deadlines()


def test_strings_mean_the_same_as_values() -> None:
    typed = parse_args({"model": "m", "stages": 2, "kv_cache_memory": 2**30, "api_key": ["k"]})
    text = parse_args({"model": "m", "stages": "2", "kv_cache_memory": "1GiB", "api_key": "k"})
    assert typed == text
    assert parse_args({"model": "m", "kv_cache_memory": "1.5 kB"}).kv_cache_memory == 1500
    assert parse_args({"model": "m", "kv_cache_memory": "auto"}) == parse_args({"model": "m"})


def test_transformers_names_of_attention_are_ours() -> None:
    for theirs, ours in {"eager": "torch", "sdpa": "torch", "torch": "torch"}.items():
        assert parse_args({"model": "m", "attention_backend": theirs}).attention_backend == ours


def test_missing_mamba_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.backends.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="mamba_ssm and causal_conv1d cannot be imported"):
        parse_args({"model": "m", "mamba_backend": "mamba_ssm"})


@pytest.mark.parametrize(
    ("options", "executor", "stages", "shards"),
    [
        ({}, "local", 1, 0),
        ({"stages": 1, "expert_shards": 1}, "local", 1, 0),
        ({"stages": 2}, "pipeline", 2, 1),
        ({"stages": 1, "expert_shards": 4}, "pipeline", 1, 4),
        ({"executor": "pipeline"}, "pipeline", 1, 1),
        ({"expert_shards": 4, "expert_replicas": 2}, "pipeline", 1, 4),
    ],
)
def test_executor_follows_the_topology(
    options: dict[str, Any], executor: str, stages: int, shards: int
) -> None:
    chosen = resolved(**options)
    assert chosen.spec.executor == executor
    assert len(chosen.spec.stage_layers) == stages
    assert chosen.spec.num_expert_shards == shards
    assert chosen.spec.stage_layers[0][0] == 0
    assert chosen.spec.stage_layers[-1][1] == chosen.num_layers == 8
    assert len(bundle_cpus(chosen)) == (1 if executor == "local" else 1 + stages + shards)


@pytest.mark.parametrize("stages", [None, "3"])
@pytest.mark.parametrize("asked", ["0-1,2,3-7", ["0-1", "2-2", "3-7"]])
def test_stages_have_the_layers_that_were_asked_for(asked: object, stages: str | None) -> None:
    spec = resolved(stage_layers=asked, stages=stages).spec
    assert spec.stage_layers == ((0, 2), (2, 3), (3, 8))
    assert (spec.executor, spec.num_expert_shards) == ("pipeline", 1)
    assert spec.limits.max_in_flight == 3


def test_one_range_is_one_stage() -> None:
    assert resolved(stage_layers="0-7").spec.executor == "local"
    alone = resolved(stage_layers="0-7", executor="pipeline").spec
    assert alone.stage_layers == ((0, 8),)
    assert alone.limits.lookahead


def test_layers_are_split_by_what_a_step_reads(tmp_path: Path) -> None:
    """One expert worker reads more than any layer, each of four less than one with attention."""
    wide = {"intermediate_size": 1024, "num_key_value_heads": 1}
    period = {"attn_layer_period": 8, "attn_layer_offset": 4, "num_hidden_layers": 8}
    folder = str(write_tiny("jamba", tmp_path, **wide, **period))
    alone, shared = (
        resolve(parse_args({"model": folder, "stages": 4, "expert_shards": count})).spec
        for count in (1, 4)
    )
    assert alone.stage_layers == ((0, 2), (2, 4), (4, 6), (6, 8))
    # Attention is the largest part now and alone in its stage.
    assert shared.stage_layers[2:] == ((4, 5), (5, 8))


@pytest.mark.parametrize(
    ("options", "warm_spare"),
    [
        ({}, False),
        ({"stages": 2}, True),
        ({"warm_spare": True}, True),
        ({"stages": 2, "warm_spare": "false"}, False),
    ],
)
def test_a_spare_waits_where_workers_are_many(options: dict[str, Any], warm_spare: bool) -> None:
    assert resolved(**options).spec.warm_spare is warm_spare


def test_every_worker_has_its_cpus_in_its_bundle() -> None:
    many = {"stages": 2, "expert_shards": 3}
    for options in ({}, many, {"executor": "pipeline"}, {"nodes": 1}, {**many, "nodes": 2}):
        chosen = resolved(**options, cpus_per_actor=0.5)
        actors = Counter(bundle_index(worker) for worker in worker_specs(chosen.spec))
        actors[0] += 1  # the ingress
        assert bundle_cpus(chosen) == [actors[i] * 0.5 for i in range(len(actors))]


def test_nodes_have_equal_shares_in_order() -> None:
    spec = resolved(stages=4, expert_shards=5, nodes=2).spec
    on_second = {worker.peer for worker in worker_specs(spec) if bundle_index(worker) == 1}
    assert on_second == {"stage-2", "stage-3", "expert-3", "expert-4"}


def test_no_node_goes_without_and_none_has_more_than_its_share() -> None:
    for stages, shards in product(range(1, 9), range(1, 17, 3)):
        spec = resolved(executor="pipeline", stages=stages, expert_shards=shards).spec
        for nodes in range(1, max(stages, shards) + 1):
            workers = worker_specs(replace(spec, num_nodes=nodes))
            assert {bundle_index(worker) for worker in workers} == set(range(nodes))
            for role in (Role.STAGE, Role.EXPERT):
                where = [bundle_index(worker) for worker in workers if worker.role is role]
                assert where == sorted(where)
                shares = [where.count(node) for node in range(nodes)]
                assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("shards", "nodes"), [(2, 2), (6, 2), (16, 2), (16, 4), (7, 3)])
def test_copies_of_an_expert_are_on_different_nodes(shards: int, nodes: int) -> None:
    spec = resolved(expert_shards=shards, expert_replicas=2, nodes=nodes).spec
    node = {w.index: bundle_index(w) for w in worker_specs(spec) if w.role is Role.EXPERT}
    assert spec.placement is not None
    for holders in spec.placement.shards:
        assert len({node[shard] for shard in holders}) == 2


def test_defaults_come_from_the_checkpoint() -> None:
    chosen = resolved()
    assert chosen.served_model_name == "nano-jamba"
    assert chosen.spec.dtype == "float32"
    assert chosen.spec.limits.max_model_len == 512
    assert chosen.spec.limits.num_state_slots == 32
    assert resolve(parse_args({"model": "nano-dbrx"})).spec.limits.num_state_slots == 0
    assert resolve(parse_args({"model": "nano-phimoe"})).spec.limits.reprefill_length == 96
    folder = str(nano_checkpoint("nano-dbrx"))
    assert resolve(parse_args({"model": folder})).served_model_name == "nano-dbrx"


def test_kv_cache_holds_no_more_than_can_be_used() -> None:
    for size in ("auto", "1GiB"):
        spec = resolved(max_num_seqs=4, max_model_len=100, kv_cache_memory=size).spec
        assert (spec.limits.num_blocks, spec.limits.num_snapshots) == (4 * 7, 4 * 4)
        assert bool(spec.cache_costs) == (size == "auto")


def test_a_given_size_counts_over_all_stages() -> None:
    # nano-jamba's one attention layer keeps 2 heads of 16 float32 elements of keys and values;
    # each of its 7 others has 128 channels of 3 + 16.
    block, state = 2 * 16 * 2 * 16 * 4, 7 * 128 * 19 * 4
    least = 4 * state + 7 * block
    few: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 100}
    for stages in (1, 3):
        sized = resolved(**few, stages=stages, kv_cache_memory=least + 2 * block).spec
        assert (sized.limits.num_blocks, sized.limits.num_snapshots) == (9, 0)
        with pytest.raises(ConfigError, match=rf"allowed values are {least} \(.* or more"):
            resolved(**few, stages=stages, kv_cache_memory=least - 1)
        costs = resolved(**few, stages=stages).spec.cache_costs
        assert len(costs) == stages
        assert sum(cost.block_bytes for cost in costs) == block
        assert sum(cost.state_bytes for cost in costs) == state


def copy_of(name: str, target: Path) -> Path:
    return Path(shutil.copytree(nano_checkpoint(name), target / name))


def test_missing_folders_and_files(tmp_path: Path) -> None:
    for model, word in ((tmp_path / "nothing", "no such folder"), (tmp_path, "config.json")):
        with pytest.raises(ConfigError, match=word):
            resolve(parse_args({"model": str(model)}))


def test_unsupported_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ConfigError, match="LlamaForCausalLM") as error:
        resolve(parse_args({"model": str(tmp_path)}))
    assert "JambaForCausalLM" in str(error.value)


def test_missing_weights_are_found_without_reading_them(tmp_path: Path) -> None:
    folder = copy_of("nano-dbrx", tmp_path)
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ConfigError, match=first.name):
        resolve(parse_args({"model": str(folder)}))


def test_dense_jamba_has_no_expert_actors(tmp_path: Path) -> None:
    from deploy.resolve import _placement
    from models.registry import load_config

    raw = json.loads((nano_checkpoint("nano-jamba") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "num_experts": 1}))
    dense = load_config(tmp_path)
    assert _placement(parse_args({"model": "m", "stages": 2}), dense) is None
    with pytest.raises(ConfigError, match="expert_shards=2"):
        _placement(parse_args({"model": "m", "expert_shards": 2}), dense)


def test_kernels_that_do_not_exist_fail_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONCLAVE_KERNELS", "fast")
    with pytest.raises(ConfigError, match="CONCLAVE_KERNELS=fast: allowed values are auto, native"):
        resolved()
    with pytest.raises(ConfigError, match="kernels=auto,-fast: allowed values are auto, native"):
        parse_args({"model": "m", "kernels": "auto,-fast"})


@pytest.mark.parametrize(
    ("environment", "options", "chosen"),
    [
        ("", {}, "auto"),
        ("avx2,-rope", {}, "avx2,-rope"),
        ("avx2,-rope", {"kernels": "native,-scan"}, "native,-scan"),
        ("", {"attention_backend": "torch"}, "auto,-attention"),
        ("", {"attention_backend": "sdpa", "kernels": "avx2,-rope"}, "avx2,-attention,-rope"),
        ("", {"mamba_backend": "torch"}, "auto,-convolution,-scan"),
        ("", {"mamba_backend": "native"}, "native"),
        ("avx512", {"attention_backend": "native"}, "avx512"),
        ("torch", {"attention_backend": "torch"}, "torch"),
    ],
)
def test_kernels_are_chosen_by_options_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: str, options: dict[str, str], chosen: str
) -> None:
    monkeypatch.setenv("CONCLAVE_KERNELS", environment)
    assert resolved(**options).spec.kernels == chosen


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"attention_backend": "native", "kernels": "torch"}, "attention_backend=native.*torch"),
        ({"mamba_backend": "native", "kernels": "auto,-scan"}, "mamba_backend=native.*auto,-scan"),
    ],
)
def test_a_backend_that_was_taken_out_is_refused(options: dict[str, str], refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        resolved(**options)
