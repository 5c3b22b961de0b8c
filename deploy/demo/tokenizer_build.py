"""Build each nano checkpoint's tokenizer, chat template and generation config.

A word of the tasks' fixed phrases is one token and everything else is spelt in bytes, so any
text can be encoded, and letters and digits are visible to the model one by one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from deploy.demo.tasks import reserved_words

# One digit at a time, a word with the space before it, a run of marks, a run of white space.
_PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
MAX_MODEL_LEN = 512


@dataclass(frozen=True)
class ChatFormat:
    """A family's special tokens and turn format."""

    leading_specials: tuple[str, ...]
    trailing_specials: tuple[str, ...]
    bos: str
    eos: tuple[str, ...]
    pad: str
    unk: str
    adds_bos: bool
    assistant_header: str
    turn_end: str
    template: str


_DBRX_TEMPLATE = r"""{%- for message in messages -%}
{%- if not loop.first -%}{{- '\n' -}}{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n<|im_start|>assistant\n' -}}{%- endif -%}
"""

_PHIMOE_TEMPLATE = r"""{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""

# Assistant turns are generated with the space after the role token, so it is trimmed here.
_JAMBA_TEMPLATE = r"""{{- bos_token -}}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' -%}{%- set content = content | trim -%}{%- endif -%}
{{- '<|bom|><|' + message['role'] + '|> ' + content + '<|eom|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|bom|><|assistant|>' -}}{%- endif -%}
"""

CHAT_FORMATS = {
    "nano-dbrx": ChatFormat(
        leading_specials=(),
        trailing_specials=("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"),
        bos="<|endoftext|>",
        eos=("<|endoftext|>", "<|im_end|>"),
        pad="<|pad|>",
        unk="<|endoftext|>",
        adds_bos=False,
        assistant_header="<|im_start|>assistant\n",
        turn_end="<|im_end|>",
        template=_DBRX_TEMPLATE,
    ),
    "nano-phimoe": ChatFormat(
        leading_specials=("<unk>", "<s>", "</s>"),
        trailing_specials=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        bos="<s>",
        eos=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        pad="<|endoftext|>",
        unk="<unk>",
        adds_bos=False,
        assistant_header="<|assistant|>\n",
        turn_end="<|end|>",
        template=_PHIMOE_TEMPLATE,
    ),
    "nano-jamba": ChatFormat(
        leading_specials=("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>"),
        trailing_specials=(
            "<|eom|>",
            "<|bom|>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|tool|>",
        ),
        bos="<|startoftext|>",
        eos=("<|endoftext|>", "<|eom|>"),
        pad="<|pad|>",
        unk="<|unk|>",
        adds_bos=True,
        assistant_header="<|bom|><|assistant|>",
        turn_end="<|eom|>",
        template=_JAMBA_TEMPLATE,
    ),
}


def build_tokenizer(name: str) -> Tokenizer:
    """Build one family's tokenizer: specials at the family's end of the id range."""
    chat = CHAT_FORMATS[name]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = sorted(reserved_words())
    # Byte-level pieces write the leading space as this letter.
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *("Ġ" + w for w in words)]
    tokens = [*chat.leading_specials, *pieces, *chat.trailing_specials]
    vocab = {token: index for index, token in enumerate(tokens)}
    # No merges: a piece that is a whole entry is taken as such, any other falls to bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = (*chat.leading_specials, *chat.trailing_specials)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if chat.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{chat.bos} $A",
            pair=f"{chat.bos} $A $B",
            special_tokens=[(chat.bos, vocab[chat.bos])],
        )
    return tokenizer


def padded_vocab(tokenizer: Tokenizer) -> int:
    """Round the embedding rows up to a multiple of 16, as the published models pad theirs."""
    return (int(tokenizer.get_vocab_size()) + 15) // 16 * 16


def write_json(path: Path, value: object) -> None:
    """Write a JSON file the way the published repositories lay theirs out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(name: str, folder: Path) -> Tokenizer:
    """Write the tokenizer, its config, the chat template and the generation config."""
    chat = CHAT_FORMATS[name]
    tokenizer = build_tokenizer(name)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": chat.adds_bos,
            "add_eos_token": False,
            "bos_token": chat.bos,
            "eos_token": chat.eos[0],
            "pad_token": chat.pad,
            "unk_token": chat.unk,
            "model_max_length": MAX_MODEL_LEN,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": tokenizer.token_to_id(chat.bos),
            "eos_token_id": [tokenizer.token_to_id(token) for token in chat.eos],
            "pad_token_id": tokenizer.token_to_id(chat.pad),
        },
    )
    return tokenizer
