"""Engine limits of every kind of model, small enough that everything runs out."""

from __future__ import annotations

from hypothesis import strategies as st

from router.limits import EngineLimits

Fields = dict[str, int]


steps = st.fixed_dictionaries(
    {"max_in_flight": st.integers(1, 3), "few_tokens": st.none() | st.integers(0, 4)}
) | st.just({"lookahead": True})


@st.composite
def engine_limits(draw: st.DrawFn, max_model_len: int) -> EngineLimits:
    """Attention, sliding window, LongRoPE, recurrent, or all at once."""
    windows = st.fixed_dictionaries({"window": st.integers(1, max_model_len // 3)})
    long_ropes = st.fixed_dictionaries({"reprefill_length": st.integers(1, max_model_len)})
    slots = st.fixed_dictionaries(
        {"num_state_slots": st.integers(1, 4), "num_snapshots": st.sampled_from([0, 1, 2, 8, 8])}
    )
    mixed = [windows, long_ropes, slots]
    kind: list[st.SearchStrategy[Fields]] = draw(
        st.sampled_from([[], [windows], [windows], [long_ropes], [slots], [slots], [slots], mixed])
    )
    fields: Fields = {"num_state_slots": 0}
    for part in kind:
        fields.update(draw(part))
    block_size = draw(st.integers(1, 5))
    least = -(-max_model_len // block_size)
    return EngineLimits(
        block_size=block_size,
        num_blocks=draw(st.integers(least, least + least // 2)),
        max_num_seqs=draw(st.integers(2, 6)),
        max_num_batched_tokens=draw(st.sampled_from([1, 3, 8, 24, 60])),
        max_model_len=max_model_len,
        **draw(steps),
        prefix_caching=draw(st.sampled_from([True] * 6 + [False])),
        **fields,
    )
