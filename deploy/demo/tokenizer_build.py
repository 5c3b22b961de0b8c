"""Build each nano checkpoint's tokenizer files, chat template and generation config.

A word of the tasks' fixed phrases is one token and everything else is spelt in bytes, so any
text can be encoded, and letters and digits are visible to the model one by one. Every family has
a tokenizer.json and its own kind of file beside it, with the same ids for any text.
"""

from __future__ import annotations

import argparse
import base64
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from deploy.byte_letters import BYTE_OF_LETTER
from deploy.demo.sentencepiece_build import build_model
from deploy.demo.tasks import reserved_words
from deploy.tokenizer_tiktoken import CL100K_SPLIT

MAX_MODEL_LEN = 512
# Byte-level letters in the order of their ids, with the byte that each stands for.
_LETTERS = dict(sorted(BYTE_OF_LETTER.items()))


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
    file: str
    assistant_header: str
    turn_end: str
    template: str

    @property
    def specials(self) -> tuple[str, ...]:
        """Every special token, in the order of the ids."""
        return (*self.leading_specials, *self.trailing_specials)


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
        file="tokenizer.tiktoken",
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
        file="tokenizer.model",
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
        file="tokenizer.model",
        assistant_header="<|bom|><|assistant|>",
        turn_end="<|eom|>",
        template=_JAMBA_TEMPLATE,
    ),
}


def vocabulary(name: str) -> list[str | None]:
    """Every id's token in byte-level letters; None where the family's file can have no token.

    Tiktoken would merge a word of two letters within a longer one, and sentencepiece cannot tell
    a small word without a space from the end of another. No trained text has either.
    """
    chat = CHAT_FORMATS[name]
    words = sorted(reserved_words())
    shortest = 3 if chat.file == "tokenizer.tiktoken" else MAX_MODEL_LEN
    bare = [w if len(w) >= shortest or w[0].isupper() else None for w in words]
    # Byte-level pieces write the leading space as this letter.
    return [
        *chat.leading_specials,
        *_LETTERS,
        *bare,
        *("Ġ" + w for w in words),
        *chat.trailing_specials,
    ]


def build_tokenizer(name: str) -> Tokenizer:
    """Build one family's tokenizer.json: specials at the family's end of the id range."""
    chat = CHAT_FORMATS[name]
    vocab = {token: i for i, token in enumerate(vocabulary(name)) if token is not None}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if chat.file == "tokenizer.tiktoken":
        split, merges = CL100K_SPLIT, _merges(_ranks(name))
    else:
        split, merges = _word_split(), []
    # A piece that is a whole entry is taken as such, any other is merged from bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in chat.specials]
    )
    if chat.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{chat.bos} $A",
            pair=f"{chat.bos} $A $B",
            special_tokens=[(chat.bos, vocab[chat.bos])],
        )
    return tokenizer


def padded_vocab(tokenizer: Tokenizer) -> int:
    """Round the embedding rows up to a multiple of 16, as the published models pad theirs."""
    return (max(tokenizer.get_vocab().values()) + 16) // 16 * 16


def _word_split() -> str:
    """The words that a sentencepiece model can see: see `build_model`."""
    words = sorted(reserved_words())
    capital = "|".join(w for w in words if w[0].isupper())
    small = "|".join(w for w in words if not w[0].isupper())
    return rf"(?: ?(?:{capital})| (?:{small}))(?![a-z])|[\s\S]"


def _sentencepiece_model(name: str) -> bytes:
    chat = CHAT_FORMATS[name]
    tokens = [t if t is None or t in chat.specials else _piece(t) for t in vocabulary(name)]
    return build_model(tokens, control=chat.specials, unknown=chat.unk, bos=chat.bos)


def _piece(token: str) -> str | int:
    return _LETTERS[token] if token in _LETTERS else token.replace("Ġ", " ")


def _ranks(name: str) -> dict[bytes, int]:
    """Token bytes and ids; specials have no rank."""
    specials = CHAT_FORMATS[name].specials
    return {
        bytes(_LETTERS[letter] for letter in token): index
        for index, token in enumerate(vocabulary(name))
        if token is not None and token not in specials
    }


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pairs that tiktoken would merge, in its order."""
    letter_of = {byte: letter for letter, byte in _LETTERS.items()}
    pairs = [
        (token[:i], token[i:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    return [
        ("".join(map(letter_of.__getitem__, a)), "".join(map(letter_of.__getitem__, b)))
        for a, b in pairs
    ]


def write_json(path: Path, value: object) -> None:
    """Write a JSON file the way the published repositories lay theirs out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(name: str, folder: Path) -> Tokenizer:
    """Write the tokenizer files, their config, the chat template and the generation config."""
    chat = CHAT_FORMATS[name]
    tokenizer = build_tokenizer(name)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / chat.file).write_bytes(_family_file(name))
    _write_special_tokens(name, folder, tokenizer)
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


def _family_file(name: str) -> bytes:
    if CHAT_FORMATS[name].file == "tokenizer.model":
        return _sentencepiece_model(name)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in _ranks(name).items())
    return "".join(lines).encode()


def _write_special_tokens(name: str, folder: Path, tokenizer: Tokenizer) -> None:
    """The files that name special tokens where a vocabulary of pieces or ranks cannot."""
    chat = CHAT_FORMATS[name]
    named = {"bos": chat.bos, "eos": chat.eos[0], "pad": chat.pad, "unk": chat.unk}
    others = [token for token in chat.specials if token not in named.values()]
    special_tokens = {f"{role}_token": token for role, token in named.items()}
    write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": others, **special_tokens},
    )
    # Jamba's special tokens are all pieces of its model; the other two add theirs behind it.
    if not chat.adds_bos:
        added = {token: tokenizer.token_to_id(token) for token in chat.trailing_specials}
        write_json(folder / "added_tokens.json", added)


def main() -> None:
    """Write a checkpoint's tokenizer files again, without training."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=sorted(CHAT_FORMATS))
    parser.add_argument("--out", type=Path, required=True, help="an existing checkpoint folder")
    args = parser.parse_args()
    write_tokenizer(args.name, args.out)


if __name__ == "__main__":
    main()
