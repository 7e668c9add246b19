from __future__ import annotations

from pathlib import Path

import pytest

from qrag_retriever.errors import DatasetError
from qrag_train.data import read_babi

BABI = Path(__file__).resolve().parents[3] / "shared" / "data" / "babi"

STORY = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary got the milk there.
5 Mary went to the garden.
6 Where is the milk? \tgarden\t4 5
1 Bill went to the office.
2 Where is Bill?\toffice\t1
"""


def test_questions_see_the_statements_above_them(tmp_path):
    path = tmp_path / "qa.txt"
    path.write_text(STORY)
    first, second, third = read_babi(path)
    assert first.chunks == ("Mary moved to the bathroom.", "John went to the hallway.")
    assert (first.id, first.question, first.answer) == ("qa/1/3", "Where is Mary?", "bathroom")
    assert first.support == (0,)
    assert second.chunks[2:] == ("Mary got the milk there.", "Mary went to the garden.")
    assert second.support == (2, 3)
    assert (third.id, third.chunks) == ("qa/2/2", ("Bill went to the office.",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Mary left.", "line 9: expected number 3 or 1"),
        ("4 Mary left.", "line 9: expected number 3 or 1"),
        ("3 Where is Mary?\toffice", "line 9: Expected question<TAB>answer<TAB>support"),
        ("3 Where is Bill?\toffice\t2", "line 9: Support line '2' is no statement"),
        ("3 Where is Bill?\toffice\t", "line 9: Sample 'qa/2/3': 'support' must be"),
        ("3 Where is Bill?\toffice\t1 1", "line 9: .*repeats an index"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    path = tmp_path / "qa.txt"
    path.write_text(f"{STORY}{line}\n")
    with pytest.raises(DatasetError, match=message) as error:
        read_babi(path)
    assert "has 1 problem;" in str(error.value)


@pytest.mark.skipif(not BABI.exists(), reason="the shared data are not here")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qa1_single-supporting-fact_valid", 1000),
        ("qa3_three-supporting-facts_valid", 250),
        ("qa4_two-arg-relations_valid", 1000),
    ],
)
def test_every_question_of_the_files_is_read(name, count):
    samples = read_babi(BABI / f"{name}.txt")
    assert len(samples) == len({sample.id for sample in samples}) == count
