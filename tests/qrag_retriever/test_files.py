"""A file is written whole or left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrag_retriever.files import whole_file


def test_a_file_takes_the_place_of_the_one_before(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("before")
    with whole_file(file) as draft:
        draft.write_text("after")
        assert file.read_text() == "before"
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"a.json": "after"}


@pytest.mark.parametrize("fails", ["while it is written", "when it is moved"])
def test_a_failure_leaves_the_file_before_and_no_draft(tmp_path, monkeypatch, fails):
    file = tmp_path / "a.json"
    file.write_text("before")

    def write() -> None:
        with whole_file(file) as draft:
            draft.write_text("half")
            if fails == "while it is written":
                raise OSError("disk full")

    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write()
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"a.json": "before"}
