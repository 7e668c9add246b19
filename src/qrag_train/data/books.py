"""Sentences of plain-text novels: the background that stories are hidden in."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qrag_retriever.errors import DatasetError

_GUTENBERG_START = re.compile(r"\*{3}\s*START OF.*?\*{3}", re.DOTALL)
_GUTENBERG_END = re.compile(r"\*{3}\s*END OF|\bEnd of (?:the |this )?Project Gutenberg")
_PARAGRAPH = re.compile(r"\n\s*\n")
# A sentence may end where a stop, with closing quotes, stands before a capital or an opening quote.
_BOUNDARY = re.compile(r"""[.!?]+['"’”)\]]*\s+(?=['"‘“(\[]*[A-Z])""")
# … unless the stop belongs to a title or an initial.
_NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Messrs|Dr|St|Mme|Mlle|M|Capt|Col|Gen|Rev|Esq|No|vol)|\b[A-Z])\.\s+$"
)


def split_sentences(text: str, *, min_words: int = 4, max_words: int = 40) -> list[str]:
    r"""Split a plain-text book into sentences of similar length.

    Line breaks inside a paragraph are white space; what Project Gutenberg puts around a book is
    dropped. A sentence shorter than ``min_words`` joins its neighbour in the paragraph (a
    paragraph that short, such as a chapter heading, is dropped); one longer than ``max_words`` is
    cut evenly.

    Args:
        text: The book.
        min_words: Least number of words of a sentence.
        max_words: Greatest number of words of a sentence.

    Returns:
        The sentences in order, white space normalised.

    Example:
        >>> split_sentences('CHAPTER I\n\n"Well?" said Mr. Bell. He had\nnot moved at all. Yes.')
        ['"Well?" said Mr. Bell.', 'He had not moved at all. Yes.']
    """
    begin = max((match.end() for match in _GUTENBERG_START.finditer(text)), default=0)
    end = _GUTENBERG_END.search(text, begin)
    text = text[begin : end.start() if end else len(text)]
    return [
        " ".join(part)
        for paragraph in _PARAGRAPH.split(text)
        for sentence in _joined(_sentences(paragraph), min_words)
        for part in _cut(sentence, max_words)
    ]


def _sentences(paragraph: str) -> Iterator[list[str]]:
    """The words of each sentence of a paragraph."""
    begin = 0
    for match in _BOUNDARY.finditer(paragraph):
        # The longest title and its stop fit into what is looked back at.
        if not _NO_END.search(paragraph, max(begin, match.start() - 8), match.end()):
            yield paragraph[begin : match.end()].split()
            begin = match.end()
    yield paragraph[begin:].split()


def _joined(sentences: Iterator[list[str]], min_words: int) -> list[list[str]]:
    joined: list[list[str]] = []
    short: list[str] = []
    for sentence in sentences:
        short += sentence
        if len(short) >= min_words:
            joined.append(short)
            short = []
    if joined:
        joined[-1] += short
    return joined


def _cut(words: list[str], max_words: int) -> Iterator[list[str]]:
    parts = -(-len(words) // max_words)
    for part in range(parts):
        yield words[len(words) * part // parts : len(words) * (part + 1) // parts]


class BackgroundText:
    """Sentences of books, one book after the other, to draw contiguous stretches from.

    Args:
        sentences: All sentences in order, at least one.

    Raises:
        DatasetError: If there is none.

    Example:
        >>> background = BackgroundText(["It rained.", "It poured.", "It stopped."])
        >>> background.stretch(4, np.random.default_rng(0))
        ['It stopped.', 'It rained.', 'It poured.', 'It stopped.']
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        if not sentences:
            raise DatasetError("There is no background sentence; give at least one book.")
        self.sentences = tuple(sentences)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, min_words: int = 4, max_words: int = 40
    ) -> BackgroundText:
        """Read all ``.txt`` files of a folder, in the order of their names.

        Args:
            folder: Where the books are; UTF-8, what cannot be decoded is replaced.
            min_words: See :func:`split_sentences`.
            max_words: See :func:`split_sentences`.

        Raises:
            DatasetError: If the folder holds no ``.txt`` file with a sentence in it, or one cannot
                be read.
        """
        books = sorted(Path(folder).glob("*.txt"))
        sentences = [
            sentence
            for book in books
            for sentence in split_sentences(_read(book), min_words=min_words, max_words=max_words)
        ]
        if not sentences:
            raise DatasetError(
                f"{folder} holds {len(books)} .txt files and no sentence; give a folder of novels "
                "as plain text."
            )
        return cls(sentences)

    def passages(self, sentences: int = 5) -> BackgroundText:
        """The same books in passages of some sentences, which stretches draw whole.

        However many texts a passage stands in, it is embedded once.

        Example:
            >>> BackgroundText(["It rained.", "It poured.", "It stopped."]).passages(2).sentences
            ('It rained. It poured.', 'It stopped.')
        """
        starts = range(0, len(self.sentences), sentences)
        return BackgroundText([" ".join(self.sentences[i : i + sentences]) for i in starts])

    def stretch(self, length: int, rng: np.random.Generator) -> list[str]:
        """``length`` sentences on end from a random place; after the last book comes the first."""
        begin = int(rng.integers(len(self.sentences)))
        turns = -(-(begin + length) // len(self.sentences))
        if turns <= 1:
            return list(self.sentences[begin : begin + length])
        return list((self.sentences * turns)[begin : begin + length])

    def stretch_of(self, characters: int, rng: np.random.Generator) -> list[str]:
        """As many sentences on end as have so many characters, one more counted for each.

        Example:
            >>> background = BackgroundText(["It rained.", "It poured."])
            >>> background.stretch_of(25, np.random.default_rng(0))
            ['It poured.', 'It rained.']
        """
        begin = int(rng.integers(len(self.sentences)))
        before = int(self._ends[begin - 1]) if begin else 0
        turns, rest = divmod(before + characters, int(self._ends[-1]))
        end = turns * len(self.sentences) + int(np.searchsorted(self._ends, rest, side="right"))
        if not turns:
            return list(self.sentences[begin:end])
        return list((self.sentences * (turns + 1))[begin:end])

    @functools.cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(sentence) + 1 for sentence in self.sentences], dtype=np.int64)


def _read(book: Path) -> str:
    try:
        return book.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise DatasetError(
            f"{book} cannot be read ({error}); give a folder of novels as plain text."
        ) from error
