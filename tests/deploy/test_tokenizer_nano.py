"""The nano checkpoints' tokenizer files: both kinds of each family give the same ids."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.chat_files import load_chat_templates
from deploy.demo import NANO_MODELS, nano_checkpoint
from deploy.demo.tasks import Task, held_out_tasks, reserved_words, train_tasks
from deploy.demo.tokenizer_build import CHAT_FORMATS, write_tokenizer
from deploy.served_model import load_served_model
from deploy.tokenizer import TextTokenizer, load_tokenizer
from tests.deploy.unicode_texts import texts

VOCAB_SIZE = 512
WORDS = sorted(reserved_words())
names = st.sampled_from(NANO_MODELS)
# Words glued to each other, to letters and to spaces: where the kinds of file could differ.
glued = st.lists(
    st.sampled_from([*WORDS, *"abceimosyHMW", " ", "\n", "é", "'s", "?", "3"]), max_size=8
)
specials = {name: CHAT_FORMATS[name].specials for name in NANO_MODELS}
any_text = st.one_of(
    glued.map("".join),
    texts(*WORDS, *itertools.chain(*specials.values())),
)


@lru_cache
def without_json(name: str) -> TemporaryDirectory[str]:
    made = TemporaryDirectory()
    leave = shutil.ignore_patterns("*.safetensors", "tokenizer.json")
    shutil.copytree(nano_checkpoint(name), made.name, dirs_exist_ok=True, ignore=leave)
    return made


@lru_cache
def both(name: str) -> tuple[TextTokenizer, TextTokenizer]:
    json_one, no_warnings = load_tokenizer(nano_checkpoint(name))
    family_one, still_none = load_tokenizer(Path(without_json(name).name))
    assert json_one is not None
    assert family_one is not None
    assert type(json_one) is not type(family_one)
    assert no_warnings == still_none == []
    return json_one, family_one


def rendered(name: str, task: Task) -> str:
    template, _ = load_chat_templates(nano_checkpoint(name))
    assert template is not None
    messages = [*task.chat(), {"role": "assistant", "content": task.answer}]
    return template.render(messages, add_generation_prompt=False)


@settings(deadline=None, max_examples=1000)
@given(names, any_text, st.booleans())
def test_both_files_encode_alike(name: str, text: str, add_special_tokens: bool) -> None:
    from_json, from_family = both(name)
    ids = from_family.encode(text, add_special_tokens=add_special_tokens)
    assert ids == from_json.encode(text, add_special_tokens=add_special_tokens)
    assert max(ids, default=0) < VOCAB_SIZE


@settings(deadline=None)
@given(names, st.lists(st.integers(0, VOCAB_SIZE + 20), max_size=40), st.booleans())
def test_both_files_decode_alike(name: str, ids: list[int], skip: bool) -> None:
    from_json, from_family = both(name)
    text = from_family.decode(ids, skip_special_tokens=skip)
    assert text == from_json.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", NANO_MODELS)
def test_both_files_agree_on_every_id(name: str) -> None:
    from_json, from_family = both(name)
    for token_id in range(VOCAB_SIZE + 2000):
        assert from_json.token_bytes(token_id) == from_family.token_bytes(token_id)
    assert from_json.special_ids == from_family.special_ids
    unused = from_json.unused_ranges(VOCAB_SIZE)
    assert unused == from_family.unused_ranges(VOCAB_SIZE)
    assert unused[-1][1] == VOCAB_SIZE
    assert all(from_json.token_bytes(i) == b"" for a, b in unused for i in range(a, b))
    owned = VOCAB_SIZE - sum(b - a for a, b in unused)
    assert sum(from_json.token_bytes(i) != b"" for i in range(VOCAB_SIZE)) == owned


@pytest.mark.parametrize("name", NANO_MODELS)
def test_the_demos_questions_encode_alike_and_as_they_were_trained(name: str) -> None:
    from_json, from_family = both(name)
    tasks = [*held_out_tasks(7, 300), *itertools.islice(train_tasks(7), 300)]
    as_trained = 0
    for task in tasks:
        text = rendered(name, task)
        ids = from_family.encode(text, add_special_tokens=False)
        assert ids == from_json.encode(text, add_special_tokens=False)
        as_trained += ids == trained_ids(name, from_json, text)
    # A made-up text may begin with a small word of the tasks' own phrases.
    assert as_trained >= len(tasks) - 2


def trained_ids(name: str, from_json: TextTokenizer, text: str) -> tuple[int | None, ...]:
    """The rule of training: a word that stands alone is a token, the rest is spelt in bytes."""
    pattern = "|".join(map(re.escape, specials[name]))
    tokens: list[str] = []
    for piece in re.findall(rf"{pattern}| ?[^\W\d_]+|.", text, re.DOTALL):
        whole = piece.strip() in WORDS or piece in specials[name]
        tokens += [piece] if whole else piece
    # Byte-level letters of the only two characters of the tasks that do not stand for themselves.
    return tuple(from_json.token_id(t.replace(" ", "Ġ").replace("\n", "Ċ")) for t in tokens)


@pytest.mark.parametrize("name", ["nano-phimoe", "nano-jamba"])
@settings(deadline=None)
@given(glued.map("".join))
def test_the_model_file_says_the_same_to_sentencepiece_alone(name: str, text: str) -> None:
    file = nano_checkpoint(name) / "tokenizer.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = library.encode(text)
    assert tuple(ids) == both(name)[0].encode(text, add_special_tokens=False)
    assert library.decode(ids) == text


@pytest.mark.parametrize("name", NANO_MODELS)
def test_a_text_prompt_gets_the_familys_bos_and_a_chat_no_second(name: str) -> None:
    question = "What is 3 + 4?"
    for tokenizer in both(name):
        bos = tokenizer.token_id(CHAT_FORMATS[name].bos)
        plain = tokenizer.encode(question, add_special_tokens=False)
        text = tokenizer.encode(question, add_special_tokens=True)
        assert text == ((bos, *plain) if name == "nano-jamba" else plain)
        chat = tokenizer.encode(
            rendered(name, Task("sum", (("user", question),), "7")), add_special_tokens=False
        )
        assert chat.count(bos or 0) == (1 if name == "nano-jamba" else 0)


@pytest.mark.parametrize("name", NANO_MODELS)
def test_a_folder_without_tokenizer_json_is_served_alike(name: str) -> None:
    whole = load_served_model(name, str(nano_checkpoint(name)), VOCAB_SIZE, 64)
    bare = load_served_model(name, without_json(name).name, VOCAB_SIZE, 64)
    assert bare.warnings == whole.warnings == ()
    assert bare.defaults == whole.defaults


@pytest.mark.parametrize("name", NANO_MODELS)
def test_the_files_are_those_that_the_documented_command_writes(name: str, tmp_path: Path) -> None:
    write_tokenizer(name, tmp_path)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (nano_checkpoint(name) / file.name).read_bytes(), file.name
    assert (tmp_path / CHAT_FORMATS[name].file).is_file()


@pytest.mark.parametrize(
    ("name", "used"), [("nano-jamba", "sentencepiece"), ("nano-dbrx", "tiktoken")]
)
def test_only_the_library_of_the_kind_in_use_is_imported(name: str, used: str) -> None:
    code = (
        "import json, sys; from pathlib import Path; from deploy.tokenizer import load_tokenizer\n"
        "seen = []\n"
        "for folder in sys.argv[1:]:\n"
        "    assert load_tokenizer(Path(folder))[0]\n"
        "    seen.append([m for m in ('sentencepiece', 'tiktoken') if m in sys.modules])\n"
        "print(json.dumps(seen))"
    )
    folders = [str(nano_checkpoint(name)), without_json(name).name]
    out = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == [[], [used]]
