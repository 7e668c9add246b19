"""Reading data files so that everything wrong with one is reported at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qrag_retriever.errors import DatasetError
from qrag_train.data.sample import SampleList, SupportSample

_SHOWN = 20


class Problems:
    """What is wrong with one file, collected while it is read and raised together.

    Args:
        path: The file, named in the error.

    Example:
        >>> problems = Problems("train.jsonl")
        >>> problems.add("line 3", "'support' is missing")
        >>> problems.raise_if_any()
        Traceback (most recent call last):
        qrag_retriever.errors.DatasetError: train.jsonl has 1 problem; correct it and read again:
          line 3: 'support' is missing
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lines: list[str] = []

    def add(self, where: str, message: str) -> None:
        """Note a problem: ``where`` in the file, and what is wrong and allowed there."""
        self._lines.append(f"  {where}: {message}")

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Note what reading one record raises because it has another shape than expected."""
        try:
            yield
        except DatasetError as error:
            self.add(where, str(error))
        except KeyError as error:
            self.add(where, f"the field {error} is missing; files without labels cannot be used")
        except RecursionError as error:
            self.add(where, f"{beyond_limits(error)}; give the official file")
        except (AttributeError, TypeError, ValueError) as error:
            self.add(where, f"a field has the wrong shape ({error}); give the official file")

    def checked(self, samples: Sequence[SupportSample]) -> SampleList:
        """What was read, if nothing was wrong.

        Raises:
            DatasetError: If any problem was noted, or there is no sample.
        """
        if not samples and not self._lines:
            self.add("the whole file", "holds no question")
        self.raise_if_any()
        return SampleList(samples)

    def raise_if_any(self) -> None:
        """Raise what was collected.

        Raises:
            DatasetError: If any problem was added; shows the first 20 and counts the rest.
        """
        count = len(self._lines)
        if not count:
            return
        shown = self._lines[:_SHOWN]
        if count > _SHOWN:
            shown.append(f"  … and {count - _SHOWN} more")
        noun, pronoun = ("problem", "it") if count == 1 else ("problems", "them")
        raise DatasetError(
            "\n".join(
                [f"{self._path} has {count} {noun}; correct {pronoun} and read again:", *shown]
            )
        )


def unwritable(text: str) -> str | None:
    r"""The first character of a text that UTF-8 cannot write, as it stands in JSON, if any.

    Example:
        >>> print(unwritable("broken \ud83d emoji"), unwritable("whole"))
        \ud83d None
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ascii(text[error.start])[1:-1]
    return None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number and text of the lines of a UTF-8 file that are not blank.

    Raises:
        DatasetError: If the file is missing, unreadable or not UTF-8.
    """
    number = 0
    try:
        # Bytes, of which only \n ends a line: JSON strings may hold other line separators.
        with Path(path).open("rb") as file:
            for number, content in enumerate(file, start=1):
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} is not UTF-8 in line {number}; convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}); check the path of the data file."
        ) from error


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        DatasetError: If the file cannot be read or is no JSON.
    """
    text = "".join(line for _, line in read_lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path} is not valid JSON ({error}); give the official file, unpacked."
        ) from error
    except (RecursionError, ValueError) as error:
        raise DatasetError(f"{path} {beyond_limits(error)}; give the official file.") from error


def read_records(path: str | Path) -> list[Any]:
    """The list in a JSON file that holds one list.

    Raises:
        DatasetError: If the file cannot be read, is no JSON, or holds no list.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise DatasetError(f"{path} must hold a JSON list of records that is not empty.")
    return records


def beyond_limits(error: RecursionError | ValueError) -> str:
    """What a message says of JSON that is valid, but that Python refuses to read."""
    if isinstance(error, RecursionError):
        return "holds lists or objects nested too deep to be read"
    return "holds a number of too many digits to be read"


def record_name(number: int, record: object, key: str) -> str:
    """How a message names record ``number``: with the value of its id field if it has one."""
    name = record.get(key) if isinstance(record, dict) else None
    return f"record {number}" if name is None else f"record {number} ({name})"
