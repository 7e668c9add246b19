"""Files brought safely to disk and compared with what they should be."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from typing import TYPE_CHECKING

from qrag_retriever.errors import ModelFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A draft to write, which takes the place of ``file`` when all went well, and is gone if not.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "settings.json")
        ...     with whole_file(file) as draft:
        ...         _ = draft.write_text("{}", encoding="utf-8")
        ...     [entry.name for entry in file.parent.iterdir()]
        ['settings.json']
    """
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")
    try:
        yield draft
        sync_file(draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def sync_file(file: Path) -> None:
    """Bring what was written to a file to disk."""
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make names durable; a no-op where folders cannot be opened (Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(file: Path, expected: str) -> None:
    """Compare a file with a published SHA-256.

    Raises:
        ModelFormatError: If the file is missing or differs.
    """
    if not file.is_file():
        raise ModelFormatError(f"{file.name} is missing in {file.parent}; install it again.")
    found = sha256_of(file)
    if found != expected:
        raise ModelFormatError(
            f"{file} has SHA-256 {found}, its publisher's has {expected}. It is "
            "damaged or was changed; it is not used. Install it again."
        )
