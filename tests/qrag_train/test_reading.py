from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata

from llm_server import LLMServer, llm_server
from qrag_retriever.errors import InvalidInputError, QRAGError, ReaderError
from qrag_train.journal import Journal
from qrag_train.metrics import answer_em, answer_f1
from qrag_train.reading import PROMPTS, Reader, Task, openai_compatible, prompt

PLACES = ("garden", "hallway", "red kitchen", "office", "cellar", "attic")
TASKS = [
    Task(f"Where is {i}?", ["Nothing.", f"Person {i} went to the {place}."], place)
    for i, place in enumerate(PLACES)
]


@pytest.fixture
def server() -> Iterator[LLMServer]:
    with llm_server() as running:
        yield running


class FromLlamaIndex(CustomLLM):
    """A LlamaIndex LLM that asks the same server."""

    url: str

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            error.close()
            raise
        return CompletionResponse(text=answer)

    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> Any:
        raise NotImplementedError


def llm(kind: str, url: str) -> Any:
    return openai_compatible(url, "tiny") if kind == "langchain" else FromLlamaIndex(url=url)


@pytest.mark.parametrize("kind", ["langchain", "llama_index"])
def test_answers_are_scored_and_not_asked_for_again(
    kind: str, server: LLMServer, tmp_path: Path
) -> None:
    file = tmp_path / "answers.jsonl"
    reader = Reader(llm(kind, server.url), "tiny", Journal(file))
    answers = reader.answers("babilong", TASKS)
    assert answers == [f"{place.split()[-1]}." for place in PLACES]
    assert server.asked == [prompt("babilong", task) for task in TASKS]
    pairs = [(answer, [place]) for answer, place in zip(answers, PLACES, strict=True)]
    scores = {
        "answer_em": sum(answer_em(*pair) for pair in pairs) / 6,
        "answer_f1": sum(answer_f1(*pair) for pair in pairs) / 6,
    }
    assert scores["answer_em"] == pytest.approx(5 / 6)  # "kitchen" is not "red kitchen"
    again = Reader(llm(kind, "http://127.0.0.1:9/v1"), "tiny", Journal(file))
    assert again.scores("babilong", TASKS) == pytest.approx(scores)
    assert len(server.asked) == 6
    named = [task._replace(other_answers=[task.answer.split()[-1]]) for task in TASKS]
    assert again.scores("babilong", named)["answer_em"] == 1
    # another benchmark's prompt, and another reader, are other questions
    reader.answers("multihop", TASKS)
    Reader(llm(kind, server.url), "small", Journal(file)).answers("babilong", TASKS)
    assert len(server.asked) == 18


@pytest.mark.parametrize("kind", ["langchain", "llama_index"])
def test_one_question_fails_and_the_others_are_kept(
    kind: str, server: LLMServer, tmp_path: Path
) -> None:
    server.refused = ("Where is 1?", "Where is 3?")
    file = tmp_path / "answers.jsonl"
    reader = Reader(llm(kind, server.url), "tiny", Journal(file))
    with pytest.raises(ReaderError, match=r"tiny answered 4 of 6 questions .*(?s:.*)400") as caught:
        reader.answers("ruler", TASKS)
    assert isinstance(caught.value, QRAGError)
    message = str(caught.value)
    assert str(file) in message
    assert "run the same command again: it asks the missing questions alone" in message
    server.refused, server.asked = (), []
    assert len(Reader(llm(kind, server.url), "tiny", Journal(file)).answers("ruler", TASKS)) == 6
    assert server.asked == [prompt("ruler", TASKS[i]) for i in (1, 3)]


def test_what_is_missing_and_whether_the_reader_is_there(server: LLMServer) -> None:
    server.refused = ("Where is 1?", "Where is 3?")
    reader = Reader(FromLlamaIndex(url=server.url), "tiny", Journal(None))
    assert reader.missing("ruler", TASKS) == 6
    with pytest.raises(ReaderError):
        reader.answers("ruler", TASKS)
    assert (reader.missing("ruler", TASKS), reader.missing("babilong", TASKS)) == (2, 6)
    assert reader.responds()
    server.refused = ("",)
    assert not reader.responds()


def test_no_questions_have_no_score() -> None:
    reader = Reader(SimpleNamespace(invoke=lambda _: "a"), "fake", Journal(None))
    assert reader.answers("ruler", []) == []
    with pytest.raises(InvalidInputError, match="give questions that have an answer"):
        reader.scores("ruler", [])


@pytest.mark.parametrize("kind", ["langchain", "llama_index"])
def test_an_unreachable_reader_is_given_up(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's own attempts
    with llm_server() as server:
        url = server.url
    file = tmp_path / "answers.jsonl"
    reader = Reader(llm(kind, url), "tiny", Journal(file))
    with pytest.raises(ReaderError, match=r"answered 0 of 6 .*See that the server runs"):
        reader.answers("babilong", TASKS)
    assert not file.exists()


def test_it_gives_up_after_three_failures_on_end(server: LLMServer) -> None:
    server.refused = tuple(f"Where is {i}?" for i in (0, 2, 3, 4))
    reader = Reader(FromLlamaIndex(url=server.url), "tiny", Journal(None))
    with pytest.raises(ReaderError, match="answered 1 of 6"):
        reader.answers("babilong", TASKS)
    assert len(server.asked) == 5


def test_failures_apart_do_not_stop_a_reader_that_goes_on(server: LLMServer) -> None:
    journal = Journal(None)
    # the second and third time these three have nothing but kept answers between them
    server.refused = tuple(f"Where is {i}?" for i in (0, 2, 4))
    reader = Reader(FromLlamaIndex(url=server.url), "tiny", journal)
    with pytest.raises(ReaderError, match="answered 2 of 5"):
        reader.answers("babilong", TASKS[:5])
    with pytest.raises(ReaderError, match="answered 3 of 6"):
        reader.answers("babilong", TASKS)


@pytest.mark.parametrize(
    ("content", "text"),
    [(" a b ", "a b"), (["a", {"type": "text", "text": " b"}, {"type": "image"}], "a b")],
)
def test_messages_of_several_blocks(content: Any, text: str) -> None:
    model = SimpleNamespace(invoke=lambda _: SimpleNamespace(content=content))
    assert Reader(model, "fake", Journal(None)).answers("ruler", TASKS[:1]) == [text]
    plain = SimpleNamespace(invoke=lambda _: " a b ")
    assert Reader(plain, "fake", Journal(None)).answers("ruler", TASKS[:1]) == ["a b"]


def test_what_is_no_llm_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match="LangChain chat model or a LlamaIndex LLM, not str"
    ):
        Reader("gpt", "gpt", Journal(None))


def test_prompts_hold_everything_and_differ() -> None:
    task = Task("Who {is} it?", ["First {0}.", "Second."], "x")
    texts = [prompt(benchmark, task) for benchmark in PROMPTS]
    assert len(set(texts)) == 3
    for text in texts:
        assert "[1] First {0}.\n[2] Second.\n\nQuestion: Who {is} it?\nAnswer:" in text
