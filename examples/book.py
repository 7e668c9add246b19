"""What the examples ask: Treasure Island (R. L. Stevenson, 1883, public domain) or another book."""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

BOOK = Path(__file__).parent / "data" / "treasure_island.txt"
# A novel is another kind of text than the passages of an encyclopaedia that the package's own model
# was trained on; the general embedder serves better here, untrained as it is.
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
QUESTION = "What treasure did Ben Gunn carry away, and where did he hide it?"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments of all these examples: the question and the book."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--question", default=QUESTION)
    result.add_argument("--book", type=Path, default=BOOK, help="a text of your own, UTF-8")
    return result


def name_of(file: Path) -> str:
    """A name for what is made of a text: another one if the text changes."""
    return f"{file.stem}-{hashlib.sha256(_read(file).encode()).hexdigest()[:8]}"


def read_chunks(file: Path, words: int = 70) -> list[str]:
    """Split a text into chunks of whole sentences, each of at least so many words."""
    text = " ".join(_read(file).split())
    chunks, current = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'])\s+", text):
        current = f"{current} {sentence}".strip()
        if len(current.split()) >= words:
            chunks.append(current)
            current = ""
    return [*chunks, current] if current else chunks


def _read(file: Path) -> str:
    if not file.is_file():
        raise SystemExit(f"{file} is no file; give --book a text, UTF-8.")
    return file.read_text(encoding="utf-8")
