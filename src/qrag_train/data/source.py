"""A source of questions as settings name it: a file, its format and what goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qrag_retriever.errors import DatasetError
from qrag_train.data.babi import read_babi
from qrag_train.data.babilong import BabiLong
from qrag_train.data.background import books
from qrag_train.data.books import BackgroundText
from qrag_train.data.hotpotqa import read_hotpotqa
from qrag_train.data.jsonl import read_corpus_jsonl, read_documents_jsonl
from qrag_train.data.linked import LinkedPassages, read_passages
from qrag_train.data.musique import read_musique
from qrag_train.data.ruler import Ruler, read_words
from qrag_train.data.sample import SampleList, SampleSource, SupportSample
from qrag_train.data.simulator import OBJECTS, PLACES, BabiSimulator
from qrag_train.data.squad import read_squad
from qrag_train.data.twowiki import read_twowiki

Format = Literal[
    "jsonl", "corpus", "babilong", "ruler", "hotpotqa", "musique", "2wiki", "squad", "linked"
]

_READERS = {
    "jsonl": read_documents_jsonl,
    "hotpotqa": read_hotpotqa,
    "musique": read_musique,
    "2wiki": read_twowiki,
    "squad": read_squad,
}
_SIMULATED = "simulated:"
_RULER = "ruler:"
_NEEDED = (("corpus", "corpus"), ("babilong", "background"), ("ruler", "background"))
# Settings of some formats, and those of simulated stories.
BELONGS: dict[str, tuple[Format, ...]] = {
    "corpus": ("corpus",),
    "background": ("babilong", "ruler"),
    "background_sentences": ("babilong", "ruler"),
    "background_people": ("babilong",),
    "background_lookalikes": ("babilong",),
    "sentences": ("babilong",),
    "moves": ("babilong",),
    "places": ("babilong",),
    "things": ("babilong",),
    "tokens": ("ruler",),
    "words": ("ruler",),
    "questions": ("ruler",),
}
_OF_SIMULATED = ("moves", "places", "things")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of questions.

    Attributes:
        file: The file with the questions; for ``babilong`` also ``simulated:2``, which makes up
            stories of bAbI's task 2 without end (tasks 1 to 5 and 14); for ``ruler`` a task, such
            as ``ruler:niah_multikey_1``, made without end.
        format: Its kind: ``jsonl`` (a document per question), ``corpus`` (questions on the chunks
            of ``corpus``), ``babilong`` (a bAbI file, hidden in ``background``), ``ruler``, or the
            official files of ``hotpotqa``, ``musique``, ``2wiki`` or ``squad``; ``linked`` makes
            up questions, without end, on titled passages that name one another.
        corpus: For ``corpus``: the JSONL file with the chunks.
        background: For ``babilong`` and ``ruler``: a folder of books as plain text.
        background_sentences: For these two: take that many sentences of the books, evenly
            spread, so that they recur and `refresh_every` saves time; ``None``: all.
        background_people: For ``babilong``: let sentences of the books that begin with "He" or
            "She" name a person of the stories instead, as some sentences of unseen books will;
            to train on, for they read like facts.
        background_lookalikes: For ``babilong``: the share of the books' sentences in whose place
            a made-up one stands that reads like a fact, but of other things or places than the
            stories', such as "Mary went back to the stable."; to train on.
        sentences: For ``babilong``: least and greatest number of chunks of a document.
        moves: For ``simulated``: how much more often people move than in bAbI's files, which
            makes the ways longer that a question asks for.
        places: For ``simulated``: number of places of a story, at most the files' 6; where there
            are few, people meet and things change hands more often.
        things: For ``simulated``: number of things of a story, at most the files' 3.
        tokens: For ``ruler``: least and greatest number of tokens of a text.
        words: For ``ruler``'s needles: a file with a word a line.
        questions: For ``ruler:qa_1`` a file of SQuAD's shape, for ``ruler:qa_2`` of HotpotQA's.
        weight: Share of the source in a mixture; ``None``: by its number of questions.
        limit: Take only so many questions, the first of the file; ``None``: all.

    Raises:
        DatasetError: If a setting that the format needs is missing or one is given that another
            format has, or ``limit`` is not positive.
    """

    file: str
    format: Format = "jsonl"
    corpus: str | None = None
    background: str | None = None
    background_sentences: int | None = None
    background_people: bool = False
    background_lookalikes: float = 0.0
    sentences: tuple[int, int] = (60, 90)
    moves: int = 1
    places: int = len(PLACES)
    things: int = len(OBJECTS)
    tokens: tuple[int, int] = (2000, 4000)
    words: str | None = None
    questions: str | None = None
    weight: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for format_, name in _NEEDED:
            if self.format == format_ and getattr(self, name) is None:
                raise DatasetError(
                    f"format={format_!r} needs {name!r}; give it beside {self.file}."
                )
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        for name, formats in BELONGS.items():
            if name in given and self.format not in formats:
                raise DatasetError(
                    f"{name} belongs to the format {' or '.join(map(repr, formats))}; leave it out "
                    f"beside {self.file}, whose format is {self.format!r}, or name that format."
                )
        for name in _OF_SIMULATED:
            if name in given and not self.file.startswith(_SIMULATED):
                raise DatasetError(
                    f"{name} belongs to stories that are made up, such as {_SIMULATED}2; leave it "
                    f"out beside {self.file}."
                )
        if not 0 <= self.background_lookalikes < 1:
            raise DatasetError(
                f"background_lookalikes={self.background_lookalikes} is not allowed; give a share "
                "of at least 0 and below 1."
            )
        endless = self.format in ("linked", "ruler") or self.file.startswith(_SIMULATED)
        if self.limit is not None and endless:
            raise DatasetError(
                f"limit={self.limit} of {self.file} is not allowed: its questions have no end; "
                "give --data.val_samples or --trainer.max_steps instead."
            )
        if self.limit is not None and self.limit < 1:
            raise DatasetError(
                f"limit={self.limit} of {self.file} is not allowed; give 1 or more, or none."
            )

    def open(self) -> SampleSource:
        """Read the files.

        Raises:
            DatasetError: If a file is missing or not as described; says where.
        """
        if self.format == "corpus":
            return read_corpus_jsonl(str(self.corpus), self.file)[: self.limit]
        if self.format in ("babilong", "ruler"):
            background = books(
                Path(str(self.background)),
                self.background_sentences,
                self.background_people,
                self.background_lookalikes,
            )
            if self.format == "ruler":
                return self._ruler(background)
            told = stories(self.file, self.moves, self.places, self.things)
            told = told[: self.limit] if isinstance(told, SampleList) else told
            return BabiLong(told, background, self.sentences)
        if self.format == "linked":
            return LinkedPassages(read_passages(self.file))
        return _READERS[self.format](self.file)[: self.limit]

    @property
    def is_file(self) -> bool:
        """Whether the questions stand in a file."""
        return not self.file.startswith((_SIMULATED, _RULER))

    def _ruler(self, background: BackgroundText) -> Ruler:
        task = self.file.removeprefix(_RULER)
        questions: Sequence[SupportSample] = ()
        if self.questions is not None:
            read = read_squad if task == "qa_1" else read_hotpotqa
            questions = read(self.questions)
        words = [] if self.words is None else read_words(self.words)
        return Ruler(task, self.tokens, background, words=words, questions=questions)


def stories(
    name: str, moves: int = 1, places: int = len(PLACES), things: int = len(OBJECTS)
) -> SampleSource:
    """BAbI's stories: of a file, or without end where the name is ``simulated:1`` and so on.

    Args:
        name: A file, or ``simulated:`` and a task.
        moves: How much more often people move in a simulated story.
        places: Its number of places.
        things: Its number of things.

    Raises:
        DatasetError: If the file cannot be read, or there is no such task.
    """
    if not name.startswith(_SIMULATED):
        return read_babi(name)
    task = name.removeprefix(_SIMULATED)
    if not task.isdecimal():
        raise DatasetError(
            f"{name!r} names no task; give {_SIMULATED}1 to {_SIMULATED}5 or {_SIMULATED}14."
        )
    return BabiSimulator(int(task), moves, places, things)
