"""How many stages there are, and which layers each of them has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.config import ConfigError, ServeArgs
from shards.layer_costs import layer_costs
from shards.partition import LayerRanges, layer_ranges_text, partition_layers

if TYPE_CHECKING:
    from models.interface import ModelConfig


def num_stages(args: ServeArgs) -> int:
    """As many as `stage_layers` has ranges, else `stages`. Raises ConfigError when they differ."""
    if args.stage_layers is None:
        return args.stages or 1
    num_ranges = len(args.stage_layers)
    if args.stages not in (None, num_ranges):
        raise ConfigError(
            f"stages={args.stages}: allowed values are {num_ranges}, the number of ranges in "
            f"stage_layers={layer_ranges_text(args.stage_layers)}"
        )
    return num_ranges


def split_layers(
    args: ServeArgs, config: ModelConfig, itemsize: int, quantization: str
) -> LayerRanges:
    """The layers of each stage, as asked for or balanced. Raises ConfigError."""
    stages, asked = num_stages(args), args.stage_layers
    if asked is None:
        num_shards = args.expert_shards or 1
        try:
            costs = layer_costs(config, itemsize, num_shards, quantization)
            return partition_layers(costs, stages)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if asked[-1][1] != config.num_layers:
        raise ConfigError(
            f"stage_layers={layer_ranges_text(asked)}: allowed values are ranges that end with "
            f"layer {config.num_layers - 1}, the last one"
        )
    return asked
