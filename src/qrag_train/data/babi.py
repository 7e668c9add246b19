"""bAbI: short stories about people and things, with the lines that support each answer."""

from __future__ import annotations

from pathlib import Path

from qrag_retriever.errors import DatasetError
from qrag_train.data.problems import Problems, read_lines
from qrag_train.data.sample import SampleList, SupportSample


def read_babi(path: str | Path) -> SampleList:
    """Read a bAbI file (``qa2_two-supporting-facts_train.txt`` and the like).

    Lines are ``number statement`` or ``number question<TAB>answer<TAB>support line numbers``;
    number 1 starts a story. The chunks of a question are the statements above it in its story, the
    support is counted in them.

    Args:
        path: The text file.

    Returns:
        One sample per question, in the file's order, with id ``file/story/line``.

    Raises:
        DatasetError: If the file cannot be read or lines are not as described; names them.
    """
    path = Path(path)
    problems = Problems(path)
    samples: list[SupportSample] = []
    story = previous = 0
    statements: dict[int, str] = {}  # line number in the story -> statement
    for place, line in read_lines(path):
        number, _, text = line.partition(" ")
        if number not in ("1", str(previous + 1)) or not text.strip():
            problems.add(
                f"line {place}", f"expected number {previous + 1} or 1, a space and a sentence"
            )
            previous = int(number) if number.isdecimal() else previous + 1
            continue
        previous = int(number)
        if previous == 1:
            story += 1
            statements = {}
        if "\t" not in text:
            statements[previous] = text.strip()
            continue
        with problems.at(f"line {place}"):
            samples.append(_question(f"{path.stem}/{story}/{number}", text, statements))
    return problems.checked(samples)


def _question(name: str, text: str, statements: dict[int, str]) -> SupportSample:
    parts = text.split("\t")
    if len(parts) != 3:
        raise DatasetError("Expected question<TAB>answer<TAB>support line numbers.")
    question, answer, support = parts
    places = {str(line): index for index, line in enumerate(statements)}
    unknown = [line for line in support.split() if line not in places]
    if unknown:
        raise DatasetError(f"Support line {unknown[0]!r} is no statement above the question.")
    return SupportSample(
        id=name,
        question=question.strip(),
        chunks=tuple(statements.values()),
        support=tuple(places[line] for line in support.split()),
        answer=answer.strip(),
    )
