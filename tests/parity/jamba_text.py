"""A tiny Jamba 1.5 with tokenizer, chat template and generation defaults, that says what it is
told to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models.driver import read_checkpoint
from tests.models.oracle import write_checkpoint
from tests.parity.jamba import SHORT, jamba
from tests.parity.remedies import full_forward, load

BOS, EOS, EOM = 1, 2, 518
SPECIAL = {
    **dict(enumerate(("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>"))),
    **dict(
        enumerate(
            (
                *("<|eom|>", "<|bom|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
                *("<documents>", "</documents>", "<tool_definitions>", "</tool_definitions>"),
                *("<active_output_modes>", "</active_output_modes>", "<citations>", "</citations>"),
                *("<tool_calls>", "</tool_calls>"),
            ),
            start=EOM,
        )
    ),
}
"""Ids of the published tokenizer."""
TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0].role != 'system' %}<|bom|><|system|> <|eom|>{% endif %}"
    "{% for m in messages %}<|bom|><|{{ m.role }}|> {{ m.content }}<|eom|>{% endfor %}"
    "{% if add_generation_prompt %}<|bom|><|assistant|>{% endif %}"
)
"""Begins with the BOS token, as the published one does."""


def write_talker(folder: Path, generation_config: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A checkpoint with its text files; returns Transformers' tokenizer of it."""
    jamba(folder, **SHORT, hidden_size=96, vocab_size=max(SPECIAL) + 1)
    _tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, chat_template=TEMPLATE, **names)


def teach(folder: Path, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """A head that continues `prompt` greedily with `answer`, shorter than the model is wide."""
    model = load(folder, torch.float64)
    states = full_forward(model.model, [*prompt, *answer[:-1]]).last_hidden_state[0]
    wanted = torch.zeros(len(answer), model.config.vocab_size, dtype=torch.float64)
    wanted[range(len(answer)), list(answer)] = 10.0
    head = (torch.linalg.pinv(states[len(prompt) - 1 :]) @ wanted).t()
    tensors = read_checkpoint(folder)
    write_checkpoint(folder, {**tensors, "lm_head.weight": head.float().contiguous()})


def _tokenizer() -> Tokenizer:
    """Characters of ASCII, bytes for all others, and the published special tokens."""
    letters = ["▁", *map(chr, range(0x21, 0x7F))]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    others = (i for i in range(max(SPECIAL)) if i not in SPECIAL)
    vocab = {name: token_id for token_id, name in SPECIAL.items()}
    vocab |= dict(zip(pieces, others, strict=False))
    vocab |= {f"<|unused_{i}|>": i for i in others}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=SPECIAL[3])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return tokenizer
