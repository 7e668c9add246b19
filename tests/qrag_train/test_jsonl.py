from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qrag_retriever.errors import DatasetError
from qrag_train.data import read_corpus_jsonl, read_documents_jsonl, read_hotpotqa
from qrag_train.data.jsonl import _CORPUS_LINE, _DOCUMENT_LINE, _QUESTION_LINE, _parsed

DOCUMENT = {"id": "1", "question": "Who?", "chunks": ["a", "b", "c"], "support": [2, 0]}
QUESTION = {"id": "1", "question": "Who?", "support": ["p2"]}
CORPUS = [{"id": "p1", "text": "a"}, {"id": "p2", "text": "b", "metadata": {"page": 3}}]


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_documents(tmp_path):
    second = {**DOCUMENT, "id": "2", "answer": "b", "metadata": {"level": "hard"}}
    samples = read_documents_jsonl(write(tmp_path / "d.jsonl", DOCUMENT, "", second))
    assert [sample.id for sample in samples] == ["1", "2"]
    assert samples[0].chunks == ("a", "b", "c")
    assert samples[0].support == (2, 0)
    assert [sample.answer for sample in samples] == [None, "b"]


def test_one_corpus(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", *CORPUS)
    second = {**QUESTION, "id": "2", "support": ["p2", "p1"], "answer": None}
    samples = read_corpus_jsonl(corpus, write(tmp_path / "q.jsonl", QUESTION, second))
    assert [sample.support for sample in samples] == [(1,), (1, 0)]
    assert samples[0].chunks == ("a", "b")
    assert samples[0].chunks is samples[1].chunks


def test_lines_end_at_line_feeds_only_and_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "d.jsonl"
    text = json.dumps({**DOCUMENT, "question": "line\u2028separator\x85?"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert read_documents_jsonl(path)[0].question == "line\u2028separator\x85?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1",', "not valid JSON .*column"),
        ("[1]", "expected an object with 'id', 'question'"),
        ({**DOCUMENT, "support": [0, 3]}, "'support' holds 3, but the 3 chunks .* 0 to 2"),
        ({**DOCUMENT, "support": []}, r"'support' is \[\]; give a list of different chunk numbers"),
        ({**DOCUMENT, "support": [1, 1]}, r"'support' is \[1, 1\]; give a list of different"),
        ({**DOCUMENT, "support": [-1]}, "'support' is"),
        ({**DOCUMENT, "support": [True]}, "'support' is"),
        ({**DOCUMENT, "support": ["0"]}, "'support' is"),
        ({**DOCUMENT, "chunks": []}, "'chunks' is .*at least one"),
        ({**DOCUMENT, "chunks": "text"}, "'chunks' is"),
        ({**DOCUMENT, "chunks": [1]}, "'chunks' is"),
        ({**DOCUMENT, "question": " \n"}, "'question' is .*not blank"),
        ({**DOCUMENT, "chunks": ["a", " ", "c"]}, "chunk 1 is blank"),
        ({**DOCUMENT, "id": 1}, "'id' is 1; give a string"),
        ({**DOCUMENT, "answer": 5}, "'answer' is 5; give a string or null"),
        ({**DOCUMENT, "metadata": []}, "'metadata' is"),
        ({**DOCUMENT, "supports": [1]}, "unknown key 'supports'; allowed: 'id', 'question'"),
        ({"id": "1", "chunks": ["a"], "support": [0]}, "'question' is missing; give a string"),
        ({**DOCUMENT, "id": "0"}, "the id '0' stands in line 1 already"),
        (
            r'{"id": "1", "question": "\ud83d?", "chunks": ["a"], "support": [0]}',
            r"'question' holds \\ud83d, half of a character",
        ),
        (
            r'{"id": "1", "question": "?", "chunks": ["a", "b \udc00"], "support": [0]}',
            r"'chunks'\[1\] holds \\udc00",
        ),
        (r'{"id": "\ud83d", "question": "?", "chunks": ["a"], "support": [0]}', "'id' holds"),
        (
            r'{"id": "1", "question": "?", "answer": "\ud83d", "chunks": ["a"], "support": [0]}',
            "'answer' holds",
        ),
        pytest.param('{"id": ' + "1" * 5000 + "}", "number of too many digits", id="digits"),
        pytest.param("[" * 100_000 + "]" * 100_000, "nested too deep", id="deep"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", {**DOCUMENT, "id": "0"}, line)
    with pytest.raises(DatasetError, match=message) as error:
        read_documents_jsonl(path)
    assert "d.jsonl has 1 problem" in str(error.value)
    assert "line 2:" in str(error.value)


def test_half_characters_in_a_corpus_and_whole_ones_in_two_halves(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", *CORPUS, r'{"id": "p3", "text": "\ud83d"}')
    questions = write(
        tmp_path / "q.jsonl", r'{"id": "1", "question": "\ud83d\ude00", "support": ["p1"]}'
    )
    with pytest.raises(DatasetError, match=r"corpus.jsonl .*\n  line 3: 'text' holds \\ud83d"):
        read_corpus_jsonl(corpus, questions)
    (sample,) = read_corpus_jsonl(write(corpus, *CORPUS), questions)
    assert sample.question == "\N{GRINNING FACE}"


def test_lists_nested_as_deep_as_can_just_be_read(tmp_path):
    """Whatever the depth, reading them raises the error of this package."""
    for depth in range(800, 1000, 5):
        nested = "[" * depth + "]" * depth
        line = json.dumps(DOCUMENT)[:-1] + f', "answer": {nested}' + "}"
        with pytest.raises(DatasetError, match=r"line 1: ('answer' is|holds lists)"):
            read_documents_jsonl(write(tmp_path / "d.jsonl", line))


def test_all_problems_of_a_file_are_reported_together(tmp_path):
    wrong = {"id": "1", "question": "", "chunks": [], "support": [0], "extra": 1}
    path = write(tmp_path / "d.jsonl", wrong, {**DOCUMENT, "id": "2"}, *["{}"] * 30)
    with pytest.raises(DatasetError) as error:
        read_documents_jsonl(path)
    text = str(error.value)
    assert f"has {3 + 4 * 30} problems" in text
    assert text.count("\n  line ") == 20
    assert "line 1: unknown key 'extra'" in text
    assert "line 1: 'question'" in text
    assert "line 2" not in text
    assert text.endswith("… and 103 more")


def test_support_that_is_not_in_the_corpus(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", *CORPUS)
    questions = write(tmp_path / "q.jsonl", {**QUESTION, "support": ["p2", "p9"]})
    with pytest.raises(DatasetError, match=r"q.jsonl.*\n.*line 1: .*'p9'.*no id in corpus.jsonl"):
        read_corpus_jsonl(corpus, questions)


def test_wrong_corpus(tmp_path):
    questions = write(tmp_path / "q.jsonl", QUESTION)
    corpus = write(tmp_path / "corpus.jsonl", *CORPUS, CORPUS[0])
    with pytest.raises(DatasetError, match="line 3: the id 'p1' stands in line 1 already"):
        read_corpus_jsonl(corpus, questions)
    with pytest.raises(DatasetError, match="no valid chunk"):
        read_corpus_jsonl(write(tmp_path / "empty.jsonl"), questions)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot be read .*check the path"):
        read_documents_jsonl(tmp_path / "none.jsonl")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(DatasetError, match="not UTF-8 in line 1;"):
        read_documents_jsonl(latin)
    good = json.dumps(DOCUMENT).encode() + b"\n\n"
    latin.write_bytes(good * 5000 + '{"id": "é"}'.encode("latin-1"))
    with pytest.raises(DatasetError, match="not UTF-8 in line 10001;"):
        read_documents_jsonl(latin)
    with pytest.raises(DatasetError, match="holds no question"):
        read_documents_jsonl(write(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    ("value", "message"),
    [("1" * 5000, "a number of too many digits"), ("[" * 100_000 + "]" * 100_000, "too deep")],
    ids=["digits", "deep"],
)
def test_official_files_beyond_what_can_be_read(tmp_path, value, message):
    file = write(tmp_path / "train.json", f"[{value}]")
    with pytest.raises(DatasetError, match=rf"train.json holds .*{message}.*; give the official"):
        read_hotpotqa(file)


# --- schemas ---------------------------------------------------------------------------------


def schema(name: str):
    return json.loads((files("qrag_train.data") / "schemas" / f"{name}.json").read_text("utf-8"))


TYPES = {"string": str, "array": list, "object": dict, "integer": int, "null": type(None)}


def accepts(schema, value) -> bool:
    """A validator of the keywords that the schemas use; any other is an error."""
    documentation = {"$schema", "title", "description"}
    type_names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not isinstance(value, tuple(TYPES[name] for name in type_names)):
        return False
    checks = {
        "type": lambda _: True,
        "minLength": lambda n: len(value) >= n,
        "pattern": lambda p: re.search(p, value) is not None,
        "minimum": lambda n: value >= n,
        "minItems": lambda n: len(value) >= n,
        "uniqueItems": lambda _: len({json.dumps(v) for v in value}) == len(value),
        "items": lambda s: all(accepts(s, v) for v in value),
        "required": lambda keys: set(keys) <= set(value),
        "properties": lambda p: all(accepts(s, value[k]) for k, s in p.items() if k in value),
        "additionalProperties": lambda _: set(value) <= set(schema["properties"]),
    }
    return all(checks[key](schema[key]) for key in schema.keys() - documentation)


SCHEMAS = {
    "documents": (_DOCUMENT_LINE, DOCUMENT),
    "questions": (_QUESTION_LINE, QUESTION),
    "corpus": (_CORPUS_LINE, CORPUS[1]),
}
scalars = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(["", " ", "a", "p2"])
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.just("k"), scalars)
changes = st.dictionaries(
    st.sampled_from(["id", "question", "chunks", "support", "answer", "metadata", "text", "x"]),
    values,
    max_size=3,
)


@pytest.mark.parametrize("name", SCHEMAS)
@given(changes=changes, dropped=st.sets(st.sampled_from(["id", "question", "support", "text"])))
@example(changes={"chunks": ["", "a"]}, dropped=set())
def test_schema_and_reader_accept_the_same_lines(name, changes, dropped):
    fields, good = SCHEMAS[name]
    line = {key: value for key, value in good.items() if key not in dropped} | changes
    _, wrong = _parsed(json.dumps(line), fields)
    # of blank chunks the reader tells later, with their numbers
    blank = not wrong and name == "documents" and not all(map(str.strip, line["chunks"]))
    assert accepts(schema(name), line) == (not wrong and not blank)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_valid_and_accept_the_documented_lines(name):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema(name))
    jsonschema.Draft202012Validator(schema(name)).validate(SCHEMAS[name][1])


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_describe_every_field(name):
    fields, good = SCHEMAS[name]
    described = schema(name)
    assert accepts(described, good)
    assert described["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(described["properties"]) == set(fields)
    assert set(described["required"]) == {key for key, field in fields.items() if field.required}
    assert all(prop["description"] for prop in described["properties"].values())
