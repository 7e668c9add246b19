"""The background that a source names: which sentences of its books, and what stands in for them."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.books import BackgroundText
from qrag_train.data.simulator import (
    DROPS,
    GIVERS,
    GIVES,
    MOVES,
    OBJECTS,
    PEOPLE,
    PLACES,
    TAKES,
)

_HE = re.compile(r"^(?:He|She)\b")
# What stands between "the" and a stop is a noun, nearly always.
_NOUN = re.compile(r"\bthe ([a-z]{3,})[.,;:!?]")
_THERE = 0.2
_LOOKALIKES = (MOVES, TAKES, DROPS, GIVES)


def books(
    folder: Path, sentences: int | None = None, people: bool = False, lookalikes: float = 0.0
) -> BackgroundText:
    """The background that a folder holds, read once for all sources that share it.

    Args:
        folder: The books.
        sentences: Take so many, evenly spread; ``None``: all.
        people: Name people of bAbI's stories where sentences begin with "He" or "She".
        lookalikes: Share of the sentences that made-up ones like facts take the place of.

    Raises:
        DatasetError: As `BackgroundText.from_folder`.
    """
    files = sorted(folder.glob("*.txt"))
    state = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _books(folder, state, sentences, people, lookalikes)


@functools.lru_cache(maxsize=8)
def _books(
    folder: Path, state: tuple[object, ...], sentences: int | None, people: bool, lookalikes: float
) -> BackgroundText:
    if lookalikes:
        return mimicked(_books(folder, state, sentences, people, 0.0), lookalikes)
    if people:
        return peopled(_books(folder, state, sentences, False, 0.0))
    background = BackgroundText.from_folder(folder)
    return background if sentences is None else thinned(background, sentences)


def thinned(background: BackgroundText, count: int) -> BackgroundText:
    """``count`` sentences of a background in runs of 20 that are spread evenly over it.

    Example:
        >>> len(thinned(BackgroundText([str(i) for i in range(1000)]), 100).sentences)
        100
    """
    sentences, run = background.sentences, 20
    if count >= len(sentences):
        return background
    runs = -(-count // run)
    starts = [(len(sentences) - run) * i // max(runs - 1, 1) for i in range(runs)]
    kept = [sentence for start in starts for sentence in sentences[start : start + run]]
    return BackgroundText(kept[:count])


def peopled(background: BackgroundText) -> BackgroundText:
    """A background whose sentences that begin with "He" or "She" name people of bAbI's stories.

    Example:
        >>> peopled(BackgroundText(["He left.", "It rained.", "She ran."])).sentences
        ('Daniel left.', 'It rained.', 'John ran.')
    """
    names = itertools.cycle(PEOPLE)
    return BackgroundText(
        [_HE.sub(lambda _: next(names), sentence) for sentence in background.sentences]
    )


def mimicked(background: BackgroundText, share: float) -> BackgroundText:
    """A background some of whose sentences read like facts of bAbI's stories, and are none.

    People of the stories do in them what they do there, with nouns that only the books have.

    Args:
        background: The sentences of books; nouns are taken from them.
        share: How many of them give way, between 0 and 1.

    Raises:
        DatasetError: If the sentences have no noun that could be taken.

    Example:
        >>> book = BackgroundText(["It stood in the stable.", "It rained.", "It poured."])
        >>> mimicked(book, 0.5).sentences
        ('It stood in the stable.', 'Daniel grabbed the stable there.', 'Mary went to the stable.')
    """
    found = (noun for sentence in background.sentences for noun in _NOUN.findall(sentence))
    nouns = [noun for noun in dict.fromkeys(found) if noun not in (*PLACES, *OBJECTS)]
    if not nouns:
        raise DatasetError(
            "The books have no noun, such as in 'the stable.', to make lookalikes of facts from; "
            "give other books, or leave background_lookalikes out."
        )
    rng = np.random.default_rng(0)
    sentences = list(background.sentences)
    places = rng.choice(len(sentences), round(share * len(sentences)), replace=False)
    for place in places.tolist():
        sentences[place] = _lookalike(nouns[int(rng.integers(len(nouns)))], rng)
    return BackgroundText(sentences)


def _lookalike(noun: str, rng: np.random.Generator) -> str:
    verbs = _LOOKALIKES[int(rng.integers(len(_LOOKALIKES)))]
    verb = verbs[int(rng.integers(len(verbs)))]
    if verbs is GIVES:
        giver, receiver = rng.permutation(GIVERS)[:2].tolist()
        return f"{giver} {verb} the {noun} to {receiver}."
    person = PEOPLE[int(rng.integers(len(PEOPLE)))]
    there = " there" if verbs in (TAKES, DROPS) and rng.random() < _THERE else ""
    return f"{person} {verb} the {noun}{there}."
