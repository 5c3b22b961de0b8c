"""A plan as one JSON object with stable keys; docs/plan.md says what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deploy.plan_actors import INGRESS, numeric
from deploy.plan_bounds import decode_bound, prefill_bound, traffic
from deploy.plan_choice import Choice
from deploy.plan_model import PlannedModel
from deploy.plan_options import PlanArgs
from deploy.plan_sizes import WeightSizes, moe_layers, weight_sizes
from deploy.plan_topology import PlacedActor, Topology, node_bytes
from shards.partition import layer_ranges_text
from shards.spec import Role

SCHEMA = 1
_CORES = {INGRESS: 2, Role.ENGINE: 1, Role.DISPATCHER: 2}
_CORES_PER_GPU = 2
"""Launching kernels, and moving rows."""
_ASSUMED = (
    "memory bandwidth and FLOP/s are assumed where they are not given: --memory-bandwidth, --tflops"
)
_NOT_SERVED = "planned for; serving on CUDA is not available in this version"


def report(model: PlannedModel, choice: Choice, alternatives: Sequence[Choice]) -> dict[str, Any]:
    """Everything that is known about a plan, in plain dicts, lists, numbers and strings."""
    config, topology, machines = model.config, choice.topology, choice.machines
    spec = topology.spec
    nearby = [_alternative(model, each) for each in alternatives]
    actors = [_actor(actor) for actor in topology.actors]
    nodes = [_node(topology, node) for node in range(topology.num_nodes)]
    return {
        "schema": SCHEMA,
        "fits": choice.fits,
        "reasons": list(topology.reasons),
        "nearest": nearby[0] if nearby else None,
        "alternatives": nearby,
        "model": _model(model, choice),
        "weights": _weights(weight_sizes(config, numeric(spec), model.tensors)),
        "hardware": {
            "nodes": machines.nodes,
            "gpus_per_node": machines.gpus_per_node,
            "gpu_memory_bytes": machines.gpu_memory,
            "usable_gpu_memory_bytes": machines.usable_gpu_memory,
            "node_memory_bytes": machines.node_memory,
            "memory_bandwidth": machines.memory_bandwidth,
            "flops": machines.flops,
        },
        "options": _options(choice),
        "serve": _serve(choice),
        "servable": not machines.num_gpus,
        "notes": _notes(model, choice),
        "actors": actors,
        "bundles": [_bundle(topology, index) for index in range(len(topology.bundle_cpus))],
        "nodes": nodes,
        "totals": _totals(topology, actors, nodes),
        "traffic": _traffic(model, choice),
        "roofline": {
            "decode_batch_1": asdict(decode_bound(config, topology, machines, 1)),
            "decode_concurrency": asdict(
                decode_bound(config, topology, machines, choice.args.concurrency)
            ),
            "prefill": asdict(prefill_bound(config, topology, machines)),
        },
    }


def _model(model: PlannedModel, choice: Choice) -> dict[str, Any]:
    config = model.config
    sizes = weight_sizes(config, numeric(choice.topology.spec), model.tensors)
    kinds = [config.cache_shape(layer).kind for layer in range(config.num_layers)]
    return {
        "name": model.name,
        "family": config.family,
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
        "num_layers": config.num_layers,
        "attention_layers": kinds.count("kv"),
        "state_layers": kinds.count("state"),
        "moe_layers": len(moe_layers(config)),
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "source": model.source,
    }


def _weights(sizes: WeightSizes) -> dict[str, int]:
    return {
        "bytes": sizes.num_bytes,
        "expert_bytes": sizes.expert_bytes,
        "other_bytes": sizes.other_bytes,
        "scale_bytes": sizes.scale_bytes,
        "checkpoint_bytes": sizes.checkpoint_bytes,
        "one_expert_bytes": sizes.one_expert_bytes,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "state_bytes_per_sequence": sizes.state_bytes_per_sequence,
    }


def _options(choice: Choice) -> dict[str, Any]:
    spec, args = choice.topology.spec, choice.args
    return {
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "context": spec.limits.max_model_len,
        "concurrency": args.concurrency,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "block_size": spec.limits.block_size,
        "executor": spec.executor,
        "dispatch": spec.dispatch,
        "layout": choice.topology.layout,
        "stages": len(spec.stage_layers),
        "expert_shards": spec.num_expert_shards,
        "expert_replicas": args.expert_replicas,
        "stage_layers": layer_ranges_text(spec.stage_layers),
    }


def _serve(choice: Choice) -> dict[str, Any]:
    """Options of `conclave serve`, by their names with underscores."""
    options, spec = _options(choice), choice.topology.spec
    same = ("dtype", "dispatch", "stages", "expert_replicas", "max_num_batched_tokens")
    serve = {"model": choice.args.model, **{key: options[key] for key in same}}
    # Of a checkpoint that is quantised already nothing needs to be asked.
    serve["quantization"] = choice.args.quantization
    serve["max_model_len"] = options["context"]
    serve["max_num_seqs"] = options["concurrency"]
    if choice.args.stage_layers is not None:
        serve["stage_layers"] = options["stage_layers"]
    if spec.num_expert_shards:
        serve["expert_shards"] = spec.num_expert_shards
    if choice.machines.num_gpus or choice.topology.num_nodes > 1:
        serve["nodes"] = choice.topology.num_nodes
    return serve


def _notes(model: PlannedModel, choice: Choice) -> list[str]:
    notes = [*model.notes, *model.config.notes]
    if choice.machines.num_gpus:
        notes.append(_NOT_SERVED)
    if choice.args.memory_bandwidth is None or choice.args.tflops is None:
        notes.append(_ASSUMED)
    return notes


def _cores(actor: PlacedActor) -> int:
    if actor.process != actor.needs.name:
        return 0
    if actor.gpu is not None:
        return _CORES_PER_GPU
    return _CORES.get(actor.needs.role, 1)


def _actor(actor: PlacedActor) -> dict[str, Any]:
    needs = actor.needs
    return {
        "name": needs.name,
        "role": str(needs.role),
        "index": needs.index,
        "bundle": actor.bundle,
        "node": actor.node,
        "gpus": [] if actor.gpu is None else [actor.gpu],
        "process": actor.process,
        "gpu_count": int(actor.gpu is not None and actor.process == needs.name),
        "gpu_memory_bytes": actor.gpu_bytes,
        "cpu_memory_bytes": actor.cpu_bytes,
        "cpu_cores": _cores(actor),
        "layers": list(needs.layers) if needs.layers else None,
        "experts": list(needs.experts),
        "memory": asdict(needs.memory),
    }


def _bundle(topology: Topology, index: int) -> dict[str, Any]:
    here = [actor for actor in topology.actors if actor.bundle == index]
    resources: dict[str, float] = {"CPU": topology.bundle_cpus[index]}
    if any(actor.gpu is not None for actor in here):
        resources["GPU"] = 1
    return {
        "index": index,
        "node": here[0].node,
        "actors": [actor.needs.name for actor in here],
        "resources": resources,
        "gpu_memory_bytes": sum(actor.gpu_bytes for actor in here),
        "cpu_memory_bytes": sum(actor.cpu_bytes for actor in here),
    }


def _node(topology: Topology, node: int) -> dict[str, Any]:
    here = [actor for actor in topology.actors if actor.node == node]
    gpus = sorted({actor.gpu for actor in here if actor.gpu is not None})
    return {
        "index": node,
        "bundles": sorted({actor.bundle for actor in here}),
        "gpu_count": len(gpus),
        "gpu_memory_bytes": sum(actor.gpu_bytes for actor in here),
        "cpu_memory_bytes": node_bytes(topology.spec, here),
        "cpu_cores": sum(map(_cores, here)),
        "gpus": [
            {
                "index": gpu,
                "gpu_memory_bytes": sum(actor.gpu_bytes for actor in here if actor.gpu == gpu),
                "actors": [actor.needs.name for actor in here if actor.gpu == gpu],
            }
            for gpu in gpus
        ],
    }


def _totals(
    topology: Topology, actors: Sequence[dict[str, Any]], nodes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    memory = [actor.needs.memory for actor in topology.actors]
    return {
        "gpus_used": sum(node["gpu_count"] for node in nodes),
        "nodes_used": len(nodes),
        "gpu_memory_bytes": sum(node["gpu_memory_bytes"] for node in nodes),
        "cpu_memory_bytes": sum(node["cpu_memory_bytes"] for node in nodes),
        "cpu_cores": sum(actor["cpu_cores"] for actor in actors),
        "weight_bytes": sum(part.weights for part in memory),
        "kv_bytes": sum(part.kv for part in memory),
        "state_bytes": sum(part.state for part in memory),
        "activation_bytes": sum(part.activations for part in memory),
    }


def _traffic(model: PlannedModel, choice: Choice) -> dict[str, int]:
    moved = traffic(model.config, choice.topology.spec)
    return {**asdict(moved), "bytes": moved.stage_bytes + moved.dispatch_bytes}


def _alternative(model: PlannedModel, choice: Choice) -> dict[str, Any]:
    spec, args = choice.topology.spec, choice.args
    return {
        "nodes": args.nodes,
        "gpus_per_node": args.gpus_per_node,
        "gpu_memory_bytes": choice.machines.gpu_memory,
        "quantization": spec.quantization,
        "concurrency": args.concurrency,
        "stages": len(spec.stage_layers),
        "expert_shards": spec.num_expert_shards,
        "command": _command(args),
    }


def _command(args: PlanArgs) -> str:
    """`conclave plan` with its machines, and every other option that is not the default."""
    options = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in args.model_dump(exclude={"model"}).items()
        if key in ("nodes", "gpus_per_node") or value != PlanArgs.model_fields[key].default
    ]
    return " ".join(["conclave plan", args.model, *options])
