"""Zero-shot tasks that are made from a text, so that accuracy is measured without a network.

The text is cut into passages of 88 words that do not overlap. Each gives at most one question of each task:

- ``cloze``: the last word of a sentence, behind at least 48 words of the passage; right if every token of it
  is the model's likeliest (LAMBADA, Paperno et al., ACL 2016; here no person has checked that the word can be
  guessed).
- ``continuation``: which of four stretches of 16 words goes on with the 64 words before; the others go on
  with other passages of the text (as SWAG, Zellers et al., EMNLP 2018, takes a later caption for the right
  one).
- ``word``: which of four words stands in a sentence, scored with the 8 words behind it; the others are among
  the 40 words of the text whose frequency is nearest.

Words are what white space parts. Questions are drawn by seed, and fewer of them are the first of more.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, InvalidTextError

TEXT_TASKS = ("cloze", "continuation", "word")
VERSION = "1.0"
PASSAGE, BEFORE, QUESTION, BEHIND = 88, 48, 64, 8  # words
CHOICES, NEAR = 4, 20
_LETTERS = r"[^\W\d_]{4,}"
_LAST_OF_SENTENCE = re.compile(rf"(?<=\s){_LETTERS}(?=\s?[.!?][\"'”’)]*(?:\s|$))")


@dataclass(frozen=True)
class TextTasks:
    """From what questions are made.

    Attributes:
        text: any source of an evaluation text, see ``calibration.texts.read_documents``.
        items: questions of each task.
        seed: of their choice.

    Raises:
        InputError: for no questions at all or a negative seed.
    """

    text: str | os.PathLike[str]
    items: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("items", self.items, 1), ("seed", self.seed, 0)):
            if value < least:
                raise InputError(f"{name} of zero-shot tasks: expected at least {least}, found {value}")
        object.__setattr__(self, "text", os.fspath(self.text))


def passages(documents: Iterable[str]) -> list[str]:
    """The documents in passages of ``PASSAGE`` words, as they are written; what is left over is dropped."""
    found = []
    for document in documents:
        words = [match.span() for match in re.finditer(r"\S+", document)]
        for first in range(0, len(words) - PASSAGE + 1, PASSAGE):
            found.append(document[words[first][0] : words[first + PASSAGE - 1][1]])
    return found


def make_questions(task: str, texts: Sequence[str], made: TextTasks) -> list[dict[str, Any]]:
    """Questions of one of ``TEXT_TASKS``.

    Args:
        task: which.
        texts: see ``passages``.
        made: how many, drawn by which seed, and the text's name for messages.

    Returns:
        ``question`` and ``target`` of each cloze, else ``question``, ``choices`` and ``answer``, the place of
        the right one.

    Raises:
        InvalidTextError: if the text does not give so many.
    """
    order = list(range(len(texts)))
    random.Random(f"{made.seed} {task}").shuffle(order)
    near = _Frequencies(texts, made.seed) if task == "word" else None
    found: list[dict[str, Any]] = []
    for place in order:
        if len(found) == made.items:
            break
        rng = random.Random(f"{made.seed} {task} {place}")
        if near is not None:
            question = _word(texts[place], near, rng)
        elif task == "cloze":
            question = _cloze(texts[place])
        else:
            question = _continuation(texts, place, rng)
        if question is not None:
            found.append(question)
    if len(found) < made.items:
        raise InvalidTextError(
            f"text {made.text}: expected enough for {made.items} questions of {task}, found "
            f"{len(found)} in {len(texts)} passages of {PASSAGE} words"
        )
    return found


def _cloze(passage: str) -> dict[str, Any] | None:
    earliest = [match.start() for match in re.finditer(r"\S+", passage)][BEFORE]
    matches = [match for match in _LAST_OF_SENTENCE.finditer(passage) if match.start() >= earliest]
    if not matches:
        return None
    return {"question": passage[: matches[-1].start()].rstrip(), "target": f" {matches[-1].group()}"}


def _continuation(texts: Sequence[str], place: int, rng: random.Random) -> dict[str, Any] | None:
    if len(texts) < CHOICES:
        return None
    others = [each if each < place else each + 1 for each in rng.sample(range(len(texts) - 1), CHOICES - 1)]
    right, *wrong = (
        " " + " ".join(texts[each].split()[QUESTION : QUESTION + 16]) for each in (place, *others)
    )
    return _choice(_before(texts[place], QUESTION), right, wrong, rng)


class _Frequencies:
    """Words of four letters and more, none of them a capital, by how often they occur in a text."""

    def __init__(self, texts: Sequence[str], seed: int) -> None:
        counts = Counter(word for text in texts for word in text.split() if self.holds(word))
        words = sorted(counts)
        random.Random(f"{seed} words").shuffle(words)  # equally frequent ones, not by their letters
        self._ranked = sorted(words, key=lambda word: -counts[word])
        self._rank = {word: rank for rank, word in enumerate(self._ranked)}

    @staticmethod
    def holds(word: str) -> bool:
        """Whether a word may be asked for."""
        return bool(re.fullmatch(_LETTERS, word)) and word.islower()

    def near(self, word: str) -> list[str]:
        """The words around it in the order of frequency."""
        rank = self._rank[word]
        return self._ranked[max(rank - NEAR, 0) : rank] + self._ranked[rank + 1 : rank + 1 + NEAR]


def _word(passage: str, frequencies: _Frequencies, rng: random.Random) -> dict[str, Any] | None:
    words = passage.split()
    places = [place for place in range(BEFORE, PASSAGE - BEHIND) if frequencies.holds(words[place])]
    if not places:
        return None
    place = rng.choice(places)
    near = frequencies.near(words[place])
    if len(near) < CHOICES - 1:
        return None
    behind = " ".join(words[place + 1 : place + 1 + BEHIND])
    right, *wrong = (f" {word} {behind}" for word in (words[place], *rng.sample(near, CHOICES - 1)))
    return _choice(_before(passage, place), right, wrong, rng)


def _before(passage: str, words: int) -> str:
    """The first words of a passage, as they are written."""
    return passage[: [match.end() for match in re.finditer(r"\S+", passage)][words - 1]]


def _choice(question: str, right: str, wrong: list[str], rng: random.Random) -> dict[str, Any]:
    answer = rng.randrange(CHOICES)
    return {"question": question, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer}


def task_config(task: str, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The task as a configuration of lm-evaluation-harness."""
    from datasets import Dataset

    multiple = task != "cloze"
    return {
        "task": task,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(questions))},
        "test_split": "test",
        "output_type": "multiple_choice" if multiple else "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": "answer" if multiple else "target",
        **({"doc_to_choice": "choices"} if multiple else {}),
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (("acc", "acc_norm") if multiple else ("acc",))
        ],
        "metadata": {"version": VERSION},
    }
