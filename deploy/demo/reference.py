"""Transformers models of the nano checkpoints, corrected where Transformers departs from the
published families, and made quick enough to train on a processor."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)
from transformers.models.jamba import modeling_jamba
from transformers.models.phimoe import modeling_phimoe

from deploy.demo.tasks import Task

_CLASSES: dict[str, tuple[Any, Any]] = {
    "nano-dbrx": (DbrxConfig, DbrxForCausalLM),
    "nano-phimoe": (PhimoeConfig, PhimoeForCausalLM),
    "nano-jamba": (JambaConfig, JambaForCausalLM),
}


def _longrope_forward(
    self: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Switch factors as well as mscale past the boundary; Transformers 5.23 keeps the short."""
    rope = self.config.rope_parameters
    is_long = int(position_ids.max()) + 1 > rope["original_max_position_embeddings"]
    regime = "long" if is_long else "short"
    factors = torch.tensor(rope[f"{regime}_factor"], dtype=torch.float32)
    steps = torch.arange(len(factors), dtype=torch.float32) / len(factors)
    angles = position_ids[..., None].float() / (factors * rope["rope_theta"] ** steps)
    doubled = torch.cat((angles, angles), dim=-1)
    scale = rope[f"{regime}_mscale"]
    return (doubled.cos() * scale).to(x.dtype), (doubled.sin() * scale).to(x.dtype)


class _SelectiveScan(torch.autograd.Function):
    """Mamba's recurrence over a leading time axis, with a hand-made backward.

    Each moment works on buffers small enough for the cache; only the states are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: torch.Tensor,
        inputs: torch.Tensor,
        rates: torch.Tensor,
        into: torch.Tensor,
        out_of: torch.Tensor,
    ) -> torch.Tensor:
        states = torch.empty((*step.shape, rates.shape[-1]), dtype=step.dtype)
        read = torch.empty_like(step)
        scaled = step * inputs
        state = torch.zeros_like(states[0])
        for t in range(step.shape[0]):
            decay = (step[t][..., None] * rates).exp_()
            torch.addcmul(decay.mul_(state), scaled[t][..., None], into[t][:, None], out=states[t])
            state = states[t]
            read[t] = torch.bmm(state, out_of[t][..., None])[..., 0]
        ctx.save_for_backward(step, inputs, rates, into, out_of, states)
        return read

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        step, inputs, rates, into, out_of, states = ctx.saved_tensors
        grad_read = grads[0].contiguous()
        scaled = step * inputs
        grad_scaled, grad_step = torch.empty_like(step), torch.zeros_like(step)
        grad_into, grad_out_of = torch.empty_like(into), torch.empty_like(out_of)
        grad_rates = torch.zeros_like(rates)
        flow = torch.zeros_like(states[0])
        for t in range(step.shape[0] - 1, -1, -1):
            flow.addcmul_(grad_read[t][..., None], out_of[t][:, None])
            grad_out_of[t] = torch.bmm(grad_read[t][:, None], states[t])[:, 0]
            grad_scaled[t] = torch.bmm(flow, into[t][..., None])[..., 0]
            grad_into[t] = torch.bmm(scaled[t][:, None], flow)[:, 0]
            flow.mul_((step[t][..., None] * rates).exp_())
            if t > 0:
                exponent = flow * states[t - 1]
                grad_rates.add_((exponent * step[t][..., None]).sum(0))
                grad_step[t] = exponent.mul_(rates).sum(-1)
        grad_step.addcmul_(grad_scaled, inputs)
        return grad_step, grad_scaled * step, grad_rates, grad_into, grad_out_of


def _selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Stand in for the slow strided loop of Transformers' Jamba; the result is the same."""
    step = torch.nn.functional.softplus(dt + delta_bias[..., None])
    by_time = [part.permute(2, 0, 1).contiguous() for part in (step, hidden_states, B, C)]
    read: torch.Tensor = _SelectiveScan.apply(  # type: ignore[no-untyped-call]
        *by_time[:2], A, *by_time[2:]
    )
    out = (read + by_time[1] * D).permute(1, 2, 0)
    return torch.nn.functional.silu(z) * out


def apply_remedies() -> None:
    """Correct LongRoPE and speed up the scan, for every model built afterwards."""
    modeling_phimoe.PhimoeRotaryEmbedding.forward = _longrope_forward
    modeling_jamba.mamba_selective_scan = _selective_scan


def build_model(name: str, published: dict[str, Any]) -> Any:
    """Build an untrained model from a config in the published layout."""
    apply_remedies()
    config_class, model_class = _CLASSES[name]
    # A copy, since Transformers writes keys of its own into nested dictionaries.
    settings = copy.deepcopy({k: v for k, v in published.items() if k != "torch_dtype"})
    config = config_class(**settings)
    config.use_cache = False
    if name == "nano-dbrx":
        # Transformers 5.23 reads only the top-level base and would rotate with 10000.
        config.rope_parameters["rope_theta"] = float(published["attn_config"]["rope_theta"])
    return model_class(config)


@torch.no_grad()
def greedy_answers(model: Any, tokenizer: Any, tasks: list[Task], limit: int = 40) -> list[str]:
    """Answer tasks greedily by full forwards, batching only prompts of equal length.

    Without padding or a cache, every answer is what the sequence alone would give.
    """
    model.eval()
    stops = set(model.generation_config.eos_token_id)
    groups: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, task in enumerate(tasks):
        text = tokenizer.apply_chat_template(
            task.chat(), tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        groups[len(ids)].append((index, ids))
    answers = [""] * len(tasks)
    for length, members in groups.items():
        rows = torch.tensor([ids for _, ids in members])
        done = torch.zeros(len(members), dtype=torch.bool)
        for _ in range(limit):
            chosen = model(input_ids=rows, logits_to_keep=1).logits[:, -1].argmax(-1)
            rows = torch.cat((rows, chosen[:, None]), dim=1)
            done |= torch.tensor([int(token) in stops for token in chosen])
            if bool(done.all()):
                break
        for (index, _), row in zip(members, rows.tolist(), strict=True):
            new = row[length:]
            end = next((i for i, token in enumerate(new) if token in stops), len(new))
            answers[index] = tokenizer.decode(new[:end])
    return answers
