"""How many tokens of a step fit into one message to the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.config import ConfigError
from router.transport.framing import MAX_FRAME_BYTES

if TYPE_CHECKING:
    from models.interface import ModelConfig

_CHOICE_BYTES = 16
"""Of each row of a token: the expert chosen, its weight, where the row came from."""


def check_exchange(max_num_batched_tokens: int, config: ModelConfig, itemsize: int) -> None:
    """Raises ConfigError when all rows of a step, on their way to one shard, are too much."""
    row_bytes = config.hidden_size * itemsize + _CHOICE_BYTES
    most = MAX_FRAME_BYTES // (config.top_k * row_bytes)
    if max_num_batched_tokens > most:
        raise ConfigError(
            f"max_num_batched_tokens={max_num_batched_tokens}: allowed values are at most {most} "
            f"with experts in other processes: a message to one of them holds "
            f"{MAX_FRAME_BYTES >> 30} GiB"
        )
