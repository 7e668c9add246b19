from __future__ import annotations

from pathlib import Path

import pytest

from qrag_retriever.errors import DatasetError
from qrag_train.journal import Journal, content_key


def test_results_outlive_the_process(tmp_path: Path) -> None:
    file = tmp_path / "new" / "journal.jsonl"
    journal = Journal(file)
    assert not file.exists()
    journal["a"] = [1, "ü\u2028"]
    journal["b"] = {"q": 0.5}
    journal["a"] = [2]
    again = Journal(file)
    assert len(again) == 2
    assert (again["a"], again["b"]) == ([2], {"q": 0.5})
    assert "c" not in again


def test_a_line_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    journal = Journal(file)
    journal["a"], journal["b"] = 1, 2
    whole = file.read_bytes()
    for left in range(1, whole.count(b"\n") * 4):
        file.write_bytes(whole[:-left])
        again = Journal(file)
        assert "b" not in again
        assert "a" in again
    again["c"] = 3
    assert [key in Journal(file) for key in "abc"] == [True, False, True]


@pytest.mark.parametrize(
    "content", ['{"a": 1}\n', '{"a": 1, "b": 2}\n', "5\n", '[["a"], 1]\n', '{"results": [1, 2]}']
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_text(content)
    with pytest.raises(DatasetError, match=r"(Line 1|The end) of .* was not written by an earlier"):
        Journal(file)
    assert file.read_text() == content


def test_keys_tell_parts_apart() -> None:
    keys = {
        content_key("ab", "c"),
        content_key("a", "bc"),
        content_key("abc"),
        content_key("1"),
        content_key(1),
    }
    assert len(keys) == 5
    assert content_key("a", (1, 2)) == content_key("a", (1, 2))
