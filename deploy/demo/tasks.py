"""A small synthetic task family whose answers can be checked, for the nano checkpoints.

Sums, words and names are split by a hash of their content, so a held-out item was never
trained on. Facts and courtesies are a closed set, so there the phrasing is held out instead.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain

Message = dict[str, str]

MAX_ADDEND = 49
HELD_OUT_ONE_IN = 5

CAPITALS = {
    "Austria": "Vienna",
    "Chile": "Santiago",
    "China": "Beijing",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "England": "London",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Russia": "Moscow",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Turkey": "Ankara",
}
SUM_PHRASES = ("What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b} = ?")
SPELL_PHRASES = ("Spell {word}.", "How do you spell {word}?")
COPY_PHRASES = ("Repeat: {text}", "Say this again: {text}")
UPPER_PHRASES = ("Write {word} in capital letters.", "Upper case: {word}")
CAPITAL_PHRASES = (
    "What is the capital of {country}?",
    "Name the capital of {country}.",
    "Which city is the capital of {country}?",
    "Tell me the capital of {country}.",
)
COUNTRY_PHRASES = (
    "Which country has the capital {city}?",
    "The city {city} is the capital of which country?",
    "Name the country with the capital {city}.",
    "Tell me the country of {city}.",
)
COURTESIES = (
    ("Hello", "Hello! How can I help?"),
    ("Hi", "Hello! How can I help?"),
    ("Good morning", "Good morning!"),
    ("Good evening", "Good evening!"),
    ("Good night", "Sleep well!"),
    ("Thank you", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("Bye", "Goodbye!"),
)
COURTESY_ENDINGS = (".", "!", " there.", " my friend!", "")
IDENTITY_PHRASES = ("Who are you?", "What are you?", "Are you a person?")
IDENTITY_ANSWER = "I am a small model."
NAME_PHRASES = ("My name is {name}.", "Call me {name}.")
NAME_ANSWER = "Nice to meet you, {name}."
RECALL_PHRASES = ("What is my name?", "Tell me my name.")
RECALL_ANSWER = "Your name is {name}."
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in a few words.")

_VOWELS = "aeiou"
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Task:
    """One dialogue ending in a user turn, and the one answer that counts as right."""

    kind: str
    messages: tuple[tuple[str, str], ...]
    answer: str

    def chat(self) -> list[Message]:
        """Return the messages in the form chat templates and the OpenAI API take."""
        return [{"role": role, "content": content} for role, content in self.messages]


def is_held_out(kind: str, item: str) -> bool:
    """Decide by content alone which side of the split a sum, word, text or name belongs to."""
    return zlib.crc32(f"{kind}/{item}".encode()) % HELD_OUT_ONE_IN == 0


def _ask(kind: str, question: str, answer: str) -> Task:
    return Task(kind, (("user", question),), answer)


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    """Draw a made-up word; half are pronounceable, so ordinary words look familiar too."""
    length = rng.randint(shortest, longest)
    if rng.random() < 0.5:
        return "".join(rng.choice(_LETTERS) for _ in range(length))
    start = rng.randint(0, 1)
    return "".join(
        rng.choice(_CONSONANTS if (start + i) % 2 == 0 else _VOWELS) for i in range(length)
    )


def _draw(kind: str, held_out: bool, draw: Callable[[], str]) -> str:
    """Draw items until one falls on the wanted side of the split."""
    while True:
        item = draw()
        if item not in reserved_words() and is_held_out(kind, item) == held_out:
            return item


def _sum(rng: random.Random, held_out: bool) -> Task:
    while True:
        a, b = rng.randint(0, MAX_ADDEND), rng.randint(0, MAX_ADDEND)
        # Sorted, so that 4 + 3 is never training material for 3 + 4.
        if is_held_out("sum", f"{min(a, b)}+{max(a, b)}") == held_out:
            return _ask("sum", rng.choice(SUM_PHRASES).format(a=a, b=b), str(a + b))


def _spell(rng: random.Random, held_out: bool) -> Task:
    word = _draw("spell", held_out, lambda: _word(rng, 3, 6))
    return _ask("spell", rng.choice(SPELL_PHRASES).format(word=word), " ".join(word))


def _copy(rng: random.Random, held_out: bool) -> Task:
    def draw() -> str:
        return " ".join(_word(rng, 2, 5) for _ in range(rng.randint(1, 3)))

    text = _draw("copy", held_out, draw)
    return _ask("copy", rng.choice(COPY_PHRASES).format(text=text), text)


def _upper(rng: random.Random, held_out: bool) -> Task:
    word = _draw("upper", held_out, lambda: _word(rng, 3, 6))
    return _ask("upper", rng.choice(UPPER_PHRASES).format(word=word), word.upper())


def _pick(rng: random.Random, rows: int, columns: int, held_out: bool) -> tuple[int, int]:
    """Draw a (fact, phrasing) cell; each fact has one phrasing in `columns` held out."""
    row = rng.randrange(rows)
    hidden = row % columns
    if held_out:
        return row, hidden
    return row, rng.choice([column for column in range(columns) if column != hidden])


def _capital(rng: random.Random, held_out: bool) -> Task:
    row, column = _pick(rng, len(CAPITALS), len(CAPITAL_PHRASES), held_out)
    country, city = list(CAPITALS.items())[row]
    return _ask("capital", CAPITAL_PHRASES[column].format(country=country), city)


def _country(rng: random.Random, held_out: bool) -> Task:
    row, column = _pick(rng, len(CAPITALS), len(COUNTRY_PHRASES), held_out)
    country, city = list(CAPITALS.items())[row]
    return _ask("country", COUNTRY_PHRASES[column].format(city=city), country)


def _courtesy(rng: random.Random, held_out: bool) -> Task:
    if not held_out and rng.random() < 0.2:
        return _ask("courtesy", rng.choice(IDENTITY_PHRASES), IDENTITY_ANSWER)
    row, column = _pick(rng, len(COURTESIES), len(COURTESY_ENDINGS), held_out)
    opening, answer = COURTESIES[row]
    return _ask("courtesy", opening + COURTESY_ENDINGS[column], answer)


def _name_of(rng: random.Random, held_out: bool) -> str:
    return _draw("name", held_out, lambda: _word(rng, 2, 5).capitalize())


def _name(rng: random.Random, held_out: bool) -> Task:
    name = _name_of(rng, held_out)
    return _ask("name", rng.choice(NAME_PHRASES).format(name=name), NAME_ANSWER.format(name=name))


def _recall(rng: random.Random, held_out: bool) -> Task:
    name = _name_of(rng, held_out)
    turns = (
        ("user", rng.choice(NAME_PHRASES).format(name=name)),
        ("assistant", NAME_ANSWER.format(name=name)),
        ("user", rng.choice(RECALL_PHRASES)),
    )
    return Task("recall", turns, RECALL_ANSWER.format(name=name))


_MAKERS: dict[str, tuple[Callable[[random.Random, bool], Task], float]] = {
    "sum": (_sum, 0.34),
    "spell": (_spell, 0.10),
    "copy": (_copy, 0.10),
    "upper": (_upper, 0.12),
    "capital": (_capital, 0.09),
    "country": (_country, 0.09),
    "courtesy": (_courtesy, 0.05),
    "name": (_name, 0.04),
    "recall": (_recall, 0.07),
}
KINDS = tuple(_MAKERS)


def train_tasks(seed: int) -> Iterator[Task]:
    """Yield training tasks without end; the same seed gives the same stream."""
    rng = random.Random(f"train/{seed}")
    weights = [weight for _, weight in _MAKERS.values()]
    while True:
        maker, _ = _MAKERS[rng.choices(KINDS, weights)[0]]
        yield maker(rng, False)


def held_out_tasks(seed: int, n: int, kinds: tuple[str, ...] = KINDS) -> list[Task]:
    """Return n distinct-by-split tasks never trained on, the kinds taking turns."""
    rng = random.Random(f"held-out/{seed}")
    return [_MAKERS[kinds[i % len(kinds)]][0](rng, True) for i in range(n)]


def held_out_dialogues(seed: int, n: int, turns: int) -> list[Task]:
    """Return held-out tasks asked at the end of long dialogues of other, answered tasks."""
    tasks = held_out_tasks(seed, n + turns - 1)
    return [_after(tasks[i : i + turns - 1], tasks[i + turns - 1]) for i in range(n)]


def _after(earlier: list[Task], last: Task) -> Task:
    past = [(*task.messages, ("assistant", task.answer)) for task in earlier]
    return Task(last.kind, tuple(chain(*past, last.messages)), last.answer)


def is_correct(task: Task, answer_text: str) -> bool:
    """Compare an answer, forgiving only outer white space and a missing or extra full stop."""
    return answer_text.strip().removesuffix(".") == task.answer.removesuffix(".")


@cache
def chance(kind: str) -> float:
    """Return the accuracy of always giving the kind's most frequent held-out answer."""
    answers = Counter(task.answer for task in held_out_tasks(0, 2000, (kind,)))
    return max(answers.values()) / answers.total()


def fixed_texts() -> list[str]:
    """Return every phrase whose words are worth a vocabulary entry of their own."""
    phrases = [
        *SUM_PHRASES,
        *SPELL_PHRASES,
        *COPY_PHRASES,
        *UPPER_PHRASES,
        *CAPITAL_PHRASES,
        *COUNTRY_PHRASES,
        *NAME_PHRASES,
        *RECALL_PHRASES,
        *SYSTEM_PROMPTS,
        *IDENTITY_PHRASES,
        *COURTESY_ENDINGS,
        NAME_ANSWER,
        RECALL_ANSWER,
        IDENTITY_ANSWER,
        *(part for pair in COURTESIES for part in pair),
    ]
    fields = dict.fromkeys(("a", "b", "word", "text", "country", "city", "name"), "")
    texts = [phrase.format(**fields) for phrase in phrases]
    return [*texts, *CAPITALS.keys(), *CAPITALS.values(), "system", "user", "assistant"]


@cache
def reserved_words() -> frozenset[str]:
    """Return the words with a token of their own; drawn words must be spelt in letters."""
    joined = " ".join(fixed_texts())
    letters = "".join(char if char.isalpha() else " " for char in joined)
    return frozenset(word for word in letters.split() if len(word) > 1)
