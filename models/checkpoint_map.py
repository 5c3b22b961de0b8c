"""Ways in which a checkpoint holds a parameter, as `TensorSlice`s."""

from __future__ import annotations

from models.interface import TensorSlice, TensorSource


def whole(name: str, shape: tuple[int, ...], *other_names: str) -> TensorSlice:
    """All of one tensor, under its hub name or one of the `other_names`."""
    return TensorSlice(sources=tuple(TensorSource(n) for n in (name, *other_names)), shape=shape)


def stacked(*parts: TensorSlice) -> TensorSlice:
    """Several tensors in one, one below the other, so that they are multiplied at once."""
    rows = sum(part.shape[0] for part in parts)
    return TensorSlice(shape=(rows, *parts[0].shape[1:]), parts=parts)


def head_table(shape: tuple[int, int], tied: bool) -> TensorSlice:
    """lm_head [V, D], or the embedding table where the two are tied and the file holds no head.

    A head that a tied file does hold counts, as in Transformers 5.
    """
    return whole("lm_head.weight", shape, *(["model.embed_tokens.weight"] if tied else []))


def expert_matrices(
    expert: int,
    shape: tuple[int, int],
    *,
    hub: tuple[str, str, str],
    fused_prefix: str,
) -> dict[str, TensorSlice]:
    """`gate`, `up` and `down` of an expert of `shape` (F, D).

    Either the hub's three matrices, or rows of Transformers 5's stacked `gate_up_proj` [E, 2F, D]
    (gate first) and `down_proj` [E, D, F].
    """
    width, hidden = shape
    gate_up, down = f"{fused_prefix}gate_up_proj", f"{fused_prefix}down_proj"
    fused = {
        "gate": TensorSource(gate_up, 0, width, expert),
        "up": TensorSource(gate_up, width, 2 * width, expert),
        "down": TensorSource(down, index=expert),
    }
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {
        part: TensorSlice(sources=(TensorSource(name), fused[part]), shape=shapes[part])
        for name, part in zip(hub, fused, strict=True)
    }
