"""A file of results that grows while they are made, so that nothing is made twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qrag_retriever.errors import DatasetError


class Journal:
    """Results by key, in a file of JSON lines that is written after each of them.

    A last line that was cut off, by a crash or a full disk, is dropped.

    Args:
        file: The file; made with its folder when the first result comes. ``None``: memory alone.

    Raises:
        DatasetError: If a line before the last is not one that a journal wrote.

    Example:
        >>> journal = Journal(None)
        >>> journal["a"] = {"retrieved": [3, 1]}
        >>> "a" in journal, journal["a"]
        (True, {'retrieved': [3, 1]})
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._results: dict[str, Any] = {}
        if file is not None and file.exists():
            self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def __setitem__(self, key: str, result: Any) -> None:
        self._results[key] = result
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([key, result], ensure_ascii=False) + "\n")

    def __len__(self) -> int:
        return len(self._results)

    def _read(self, file: Path) -> None:
        text = file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                key, result = _entry(json.loads(line))
            except ValueError as error:
                raise DatasetError(
                    f"Line {number} of {file} was not written by an earlier run; move the file "
                    "away, and everything is measured anew."
                ) from error
            self._results[key] = result
        if whole != text:
            if not b'["'.startswith(text[len(whole) :][:2]):
                raise DatasetError(
                    f"The end of {file} was not written by an earlier run; move the file away, and "
                    "everything is measured anew."
                )
            os.truncate(file, len(whole))  # an entry that was cut short


def _entry(value: Any) -> tuple[str, Any]:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        return value[0], value[1]
    raise ValueError("it is no pair of a key and a result")


def content_key(*parts: object) -> str:
    """A name for everything that a result depends on: SHA-256 of the parts' representations.

    Example:
        >>> content_key("model", 4, ("a", "b"))[:8]
        '672c6abc'
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()
