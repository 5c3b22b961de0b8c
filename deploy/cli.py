"""`conclave serve | check | plan | quantize | demo`.

Exit codes: 0 done, 1 cannot serve, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from deploy.api_keys import with_environment_key
from deploy.config import ConfigError, parse_args, take_address
from deploy.printable import printable
from deploy.tell import tell
from shards.logs import log_to_stderr

# Heavy imports (torch, ray, rich) are inside the commands: a usage error answers at once.
app = typer.Typer(
    name="conclave",
    help="DBRX, PhiMoE and Jamba behind an OpenAI-compatible API on Ray Serve.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# Options that Serve's own ways of starting an application do not have.
_OF_THE_COMMAND = ("config", "profile_startup", "profile_startup_json")


def _option(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


@app.command()
def serve(
    model: Annotated[list[str], typer.Argument(help="Checkpoint folder or nano model.")],
    host: Annotated[str | None, _option("--host", help="Address to listen on; 127.0.0.1.")] = None,
    port: Annotated[str | None, _option("--port", help="Port to listen on; 8000.")] = None,
    config: Annotated[Path | None, _option("--config", help="YAML file of these options.")] = None,
    served_model_name: Annotated[
        str | None, _option("--served-model-name", help="Default: the folder's name.")
    ] = None,
    dtype: Annotated[
        str | None, _option("--dtype", help="auto, float32, bfloat16, float16.")
    ] = None,
    device: Annotated[str | None, _option("--device", help="auto, cpu.")] = None,
    stages: Annotated[str | None, _option("--stages", help="Stage actors.")] = None,
    stage_layers: Annotated[
        str | None, _option("--stage-layers", help="Layers of each, such as 0-8,9-17,18-31.")
    ] = None,
    expert_shards: Annotated[str | None, _option("--expert-shards", help="Expert actors.")] = None,
    expert_replicas: Annotated[
        str | None, _option("--expert-replicas", help="Copies of each expert.")
    ] = None,
    nodes: Annotated[
        str | None, _option("--nodes", help="Spread one instance evenly over so many.")
    ] = None,
    executor: Annotated[str | None, _option("--executor", help="auto, local, pipeline.")] = None,
    dispatch: Annotated[str | None, _option("--dispatch", help="actor, direct.")] = None,
    layout: Annotated[str | None, _option("--layout", help="auto, disaggregated.")] = None,
    max_model_len: Annotated[
        str | None, _option("--max-model-len", help="Longest sequence in tokens.")
    ] = None,
    max_num_seqs: Annotated[
        str | None, _option("--max-num-seqs", help="Sequences that run at once.")
    ] = None,
    max_num_batched_tokens: Annotated[
        str | None, _option("--max-num-batched-tokens", help="Tokens per step.")
    ] = None,
    kv_cache_memory: Annotated[
        str | None, _option("--kv-cache-memory", help="auto (measured), or such as 2GiB.")
    ] = None,
    block_size: Annotated[str | None, _option("--block-size", help="Tokens per KV block.")] = None,
    quantization: Annotated[
        str | None, _option("--quantization", help="none, int8 (experts), int8-all.")
    ] = None,
    kernels: Annotated[
        str | None,
        _option("--kernels", help="auto, native, torch, amx...; auto,-scan..."),
    ] = None,
    attention_backend: Annotated[
        str | None, _option("--attention-backend", help="auto, torch, native.")
    ] = None,
    mamba_backend: Annotated[
        str | None, _option("--mamba-backend", help="auto, torch, native.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        _option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse prefixes."),
    ] = None,
    tool_call_parser: Annotated[
        str | None, _option("--tool-call-parser", help="auto, jamba, hermes, json, none.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, _option("--reasoning-parser", help="auto, think, none.")
    ] = None,
    chat_template: Annotated[
        str | None, _option("--chat-template", help="Jinja file instead of the checkpoint's own.")
    ] = None,
    trust_request_chat_template: Annotated[
        bool | None,
        _option(
            "--trust-request-chat-template/--no-trust-request-chat-template",
            help="Run templates that requests bring.",
        ),
    ] = None,
    min_replicas: Annotated[
        str | None, _option("--min-replicas", help="Model instances at least; 0: none idle.")
    ] = None,
    max_replicas: Annotated[
        str | None, _option("--max-replicas", help="Model instances at most.")
    ] = None,
    ttft_target: Annotated[
        str | None, _option("--ttft-target", help="Seconds to a first token, to scale for; 2.")
    ] = None,
    scale_down_delay: Annotated[
        str | None, _option("--scale-down-delay", help="Seconds until less is enough; 60.")
    ] = None,
    drain_timeout: Annotated[
        str | None, _option("--drain-timeout", help="Seconds for requests to end; 600.")
    ] = None,
    api_key: Annotated[
        list[str] | None, _option("--api-key", help="Repeatable; or CONCLAVE_API_KEY.")
    ] = None,
    max_request_bytes: Annotated[
        str | None, _option("--max-request-bytes", help="Larger bodies are refused; 16MiB.")
    ] = None,
    body_timeout: Annotated[
        str | None, _option("--body-timeout", help="Seconds in which a body must come; 60.")
    ] = None,
    request_timeout: Annotated[
        str | None, _option("--request-timeout", help="Seconds a request may take; default: any.")
    ] = None,
    max_queue_seconds: Annotated[
        str | None, _option("--max-queue-seconds", help="Longer predicted waits get 429; 120.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, _option("--cors-origin", help="Repeatable; default: none.")
    ] = None,
    strict_requests: Annotated[
        bool | None,
        _option("--strict-requests/--no-strict-requests", help="Refuse unknown fields."),
    ] = None,
    threads: Annotated[
        str | None, _option("--threads", help="Per actor; default: by cores.")
    ] = None,
    warm_spare: Annotated[
        bool | None,
        _option("--warm-spare/--no-warm-spare", help="A process per node, to respawn fast."),
    ] = None,
    cpus_per_actor: Annotated[
        str | None, _option("--cpus-per-actor", help="Ray CPUs reserved per actor.")
    ] = None,
    hang_deadline: Annotated[
        str | None, _option("--hang-deadline", help="Seconds of silence of a hung actor.")
    ] = None,
    step_deadline: Annotated[
        str | None, _option("--step-deadline", help="Seconds one step of an actor may take.")
    ] = None,
    load_timeout: Annotated[
        str | None, _option("--load-timeout", help="Seconds an actor may take to load.")
    ] = None,
    recovery_timeout: Annotated[
        str | None, _option("--recovery-timeout", help="Seconds requests wait for recovery.")
    ] = None,
    sse_keep_alive_seconds: Annotated[
        str | None, _option("--sse-keep-alive-seconds", help="Seconds between signs of life.")
    ] = None,
    log_level: Annotated[
        str | None, _option("--log-level", help="debug, info (requests too), warning, error.")
    ] = None,
    log_format: Annotated[str | None, _option("--log-format", help="text, json.")] = None,
    otlp_endpoint: Annotated[
        str | None, _option("--otlp-endpoint", help="Collector of traces, http://HOST:4318.")
    ] = None,
    trace_sample_ratio: Annotated[
        str | None, _option("--trace-sample-ratio", help="Requests traced, 0 to 1; default 1.")
    ] = None,
    profile_startup: Annotated[
        bool, typer.Option("--profile-startup", help="Show what the start took, part by part.")
    ] = False,
    profile_startup_json: Annotated[
        Path | None, _option("--profile-startup-json", help="The same into a file, as JSON.")
    ] = None,
) -> None:
    """Serve one model until SIGTERM; prints `ready on http://HOST:PORT` when it can answer."""
    given = {key: value for key, value in locals().items() if key not in _OF_THE_COMMAND}
    if len(model) > 1:
        raise ConfigError(f"model={' '.join(model)}: allowed values are one MODEL per server")
    options = _read_config(config) | {k: v for k, v in given.items() if v is not None and v != []}
    options["model"] = model[0]
    address, options = take_address(options)
    args = parse_args(with_environment_key(options))
    log_to_stderr(logging.getLevelNamesMapping()[args.log_level.upper()], args.log_format)

    from deploy.resolve import model_folder
    from deploy.server import serve_forever

    model_folder(args.model)
    sys.exit(
        serve_forever(
            args,
            address.host,
            address.port,
            profile_startup=profile_startup,
            profile_file=profile_startup_json,
        )
    )


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or nano model.")],
    stages: Annotated[str | None, _option("--stages", help="Stage actors.")] = None,
    stage_layers: Annotated[
        str | None, _option("--stage-layers", help="Layers of each, such as 0-8,9-17,18-31.")
    ] = None,
    expert_shards: Annotated[str | None, _option("--expert-shards", help="Expert actors.")] = None,
    expert_replicas: Annotated[
        str | None, _option("--expert-replicas", help="Copies of each expert.")
    ] = None,
) -> None:
    """Say whether a checkpoint can be served, and what each actor reads, from headers alone."""
    given = {key: value for key, value in locals().items() if value is not None}
    from deploy.check import check_model

    sys.exit(check_model(given))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint, nano model or published name.")],
    nodes: Annotated[str | None, _option("--nodes", help="Machines; default 1.")] = None,
    gpus_per_node: Annotated[
        str | None, _option("--gpus-per-node", help="Default 8; 0 plans for CPUs.")
    ] = None,
    gpu_memory: Annotated[str | None, _option("--gpu-memory", help="Default 80GiB.")] = None,
    node_memory: Annotated[
        str | None, _option("--node-memory", help="Of a CPU node; default: what it takes.")
    ] = None,
    memory_bandwidth: Annotated[
        str | None, _option("--memory-bandwidth", help="Bytes/s of a device, such as 3.35TB.")
    ] = None,
    tflops: Annotated[str | None, _option("--tflops", help="TFLOP/s of a device.")] = None,
    context: Annotated[str | None, _option("--context", help="Tokens per sequence.")] = None,
    concurrency: Annotated[
        str | None, _option("--concurrency", help="Sequences at once; default 32.")
    ] = None,
    max_num_batched_tokens: Annotated[
        str | None, _option("--max-num-batched-tokens", help="Tokens per step.")
    ] = None,
    dtype: Annotated[
        str | None, _option("--dtype", help="auto, float32, bfloat16, float16.")
    ] = None,
    quantization: Annotated[
        str | None, _option("--quantization", help="none, int8 (experts), int8-all.")
    ] = None,
    stages: Annotated[str | None, _option("--stages", help="Default: chosen.")] = None,
    stage_layers: Annotated[
        str | None, _option("--stage-layers", help="Layers of each, such as 0-8,9-17,18-31.")
    ] = None,
    expert_shards: Annotated[
        str | None, _option("--expert-shards", help="Default: chosen.")
    ] = None,
    expert_replicas: Annotated[
        str | None, _option("--expert-replicas", help="Copies of each expert.")
    ] = None,
    dispatch: Annotated[str | None, _option("--dispatch", help="actor, direct.")] = None,
    layout: Annotated[
        str | None, _option("--layout", help="auto, colocated, disaggregated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Place a model on machines: memory per actor, bytes per token, bounds; 1: no room."""
    given = {key: value for key, value in locals().items() if value is not None and key != "json"}
    from deploy.plan import plan_model

    sys.exit(plan_model(given, as_json=json))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or nano model.")],
    outdir: Annotated[Path, typer.Argument(help="Folder to write, empty or not there yet.")],
    quantization: Annotated[
        str, typer.Option(help="int8 (experts), int8-all (attention and dense linears too).")
    ] = "int8",
) -> None:
    """Write a copy of a checkpoint whose weights are int8 already."""
    from deploy.quantize import quantize_model

    sys.exit(quantize_model(model, outdir, quantization))


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Held-out questions per model.", min=1)] = 27,
    port: Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65535)] = None,
) -> None:
    """Serve the three nano models on this machine, ask them questions, show who did what."""
    from deploy.demo_run import run_demo

    sys.exit(run_demo(questions, port))


def _read_config(file: Path | None) -> dict[str, Any]:
    """Options of a YAML file, under the names with underscores. Raises ConfigError."""
    if file is None:
        return {}
    import yaml

    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config={file}: cannot be read: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(options, dict):
        raise ConfigError(f"config={file}: allowed is a mapping of option names to values")
    return {str(key).replace("-", "_"): value for key, value in options.items()}


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except ConfigError as error:
        code = _fail(printable(str(error)), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # Typer vendors its own click or uses the installed one: known by what it carries.
        if not hasattr(error, "format_message"):
            raise
        code = _fail(error.format_message(), 2)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    tell(message, logging.ERROR)
    return code


if __name__ == "__main__":
    main()
