"""Answers from what was retrieved: a reader LLM, the prompts of each benchmark, scores."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tqdm.auto import tqdm

from qrag_retriever.errors import InvalidInputError, MissingDependencyError, ReaderError
from qrag_train.journal import content_key
from qrag_train.metrics import answer_em, answer_f1

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qrag_train.journal import Journal

Benchmark = Literal["multihop", "babilong", "ruler"]

_FORM = "{passages}\n\nQuestion: {question}\nAnswer:"
PROMPTS: dict[Benchmark, str] = {
    "multihop": (
        "Answer the question from the passages below. Give the answer alone, in as few words as "
        "possible: a name, a date, a number, yes or no.\n\n" + _FORM
    ),
    "babilong": (
        "The sentences below are in the order of the story. Some tell where people are and what "
        "they do with things; the others have nothing to do with the question. What is told later "
        "is true from then on. Answer with one word.\n\n" + _FORM
    ),
    "ruler": (
        "Answer the question from the text below. If there are several answers, give all of them "
        "in the order in which they stand in the text, separated by commas. Give the answer "
        "alone.\n\n" + _FORM
    ),
}
"""What a reader is asked; ``{passages}`` are numbered, in document order."""

# After so many failures on end the reader is taken for unreachable.
_GIVE_UP = 3
_ANY_QUESTION = "Answer with the word yes."


class Task(NamedTuple):
    """A question for a reader: what was retrieved for it, in document order, and the answers."""

    question: str
    passages: Sequence[str]
    answer: str
    other_answers: Sequence[str] = ()


class Reader:
    """Asks an LLM each question once; answers are kept in a journal.

    Args:
        llm: A LangChain chat model or LLM, or a LlamaIndex LLM.
        name: What decides its answers: model, address, settings. Another name asks anew.
        journal: Where answers are kept.

    Raises:
        InvalidInputError: If ``llm`` is none of these.

    Example:
        >>> from langchain_core.language_models import FakeListChatModel
        >>> from qrag_train.journal import Journal
        >>> reader = Reader(FakeListChatModel(responses=["The garden."]), "fake", Journal(None))
        >>> tasks = [Task("Where is Mary?", ["Mary went to the garden."], "garden")]
        >>> reader.scores("babilong", tasks)
        {'answer_em': 1.0, 'answer_f1': 1.0}
    """

    def __init__(self, llm: Any, name: str, journal: Journal) -> None:
        self._ask = _asking(llm)
        self.name = name
        self._journal = journal

    def answers(self, benchmark: Benchmark, tasks: Sequence[Task]) -> list[str]:
        """The reader's answers.

        Args:
            benchmark: Whose prompt to use.
            tasks: The questions.

        Raises:
            ReaderError: If the LLM fails on some question. All others are asked first, unless it
                fails on several on end; answers had so far are kept.
        """
        prompts = [prompt(benchmark, task) for task in tasks]
        keys = [self._key(text) for text in prompts]
        errors: list[Exception] = []
        on_end = 0
        for key, text in zip(tqdm(keys, desc=self.name, unit="answer"), prompts, strict=True):
            if key in self._journal:
                on_end = 0
                continue
            answer = self._answer(text)
            if isinstance(answer, str):
                self._journal[key] = answer
                on_end = 0
                continue
            errors.append(answer)
            on_end += 1
            if on_end == _GIVE_UP:
                break
        if errors:
            had = sum(key in self._journal for key in keys)
            raise ReaderError(
                f"The reader {self.name} answered {had} of {len(keys)} questions and failed with "
                f"{type(errors[-1]).__name__}: {errors[-1]} What was retrieved and these answers "
                f"are kept in {self._journal.file}. See that the server runs and that its address "
                "and the model's name are right, then run the same command again: it asks the "
                "missing questions alone."
            ) from errors[-1]
        return [str(self._journal[key]) for key in keys]

    def missing(self, benchmark: Benchmark, tasks: Sequence[Task]) -> int:
        """How many of the questions have no answer in the journal; asks nothing."""
        return sum(self._key(prompt(benchmark, task)) not in self._journal for task in tasks)

    def responds(self) -> bool:
        """Whether the LLM answers at all: if so, its failures are about the questions it got."""
        return isinstance(self._answer(_ANY_QUESTION), str)

    def scores(self, benchmark: Benchmark, tasks: Sequence[Task]) -> dict[str, float]:
        """Means of ``answer_em`` and ``answer_f1``; of several right answers the nearest counts.

        Arguments and errors as `answers`.

        Raises:
            InvalidInputError: If there is no question.
        """
        if not tasks:
            raise InvalidInputError(
                f"The reader {self.name} got no question to be scored on; give questions that have "
                "an answer."
            )
        answers = self.answers(benchmark, tasks)
        pairs = [
            (answer, [task.answer, *task.other_answers])
            for answer, task in zip(answers, tasks, strict=True)
        ]
        return {
            "answer_em": sum(answer_em(*pair) for pair in pairs) / len(pairs),
            "answer_f1": sum(answer_f1(*pair) for pair in pairs) / len(pairs),
        }

    def _key(self, text: str) -> str:
        return content_key("reader", self.name, text)

    def _answer(self, text: str) -> str | Exception:
        try:
            return self._ask(text)
        except Exception as error:  # every client has errors of its own
            return error


def prompt(benchmark: Benchmark, task: Task) -> str:
    """What the reader is asked.

    Example:
        >>> print(prompt("multihop", Task("Who?", ["One.", "Two."], "One")))
        Answer the question from the passages below. ...
        <BLANKLINE>
        [1] One.
        [2] Two.
        <BLANKLINE>
        Question: Who?
        Answer:
    """
    passages = "\n".join(f"[{number}] {text}" for number, text in enumerate(task.passages, start=1))
    return PROMPTS[benchmark].format(passages=passages, question=task.question)


def openai_compatible(url: str | None, model: str) -> Any:
    """A chat model behind an address that speaks OpenAI's protocol (vLLM, Ollama, llama.cpp, …).

    The key is taken from the variable ``OPENAI_API_KEY``; local servers need none.

    Args:
        url: The address, such as ``http://localhost:8000/v1``; ``None``: OpenAI's own.
        model: Name of the model there.

    Raises:
        MissingDependencyError: If langchain-openai is not installed.
    """
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        purpose = "A reader behind an address"
        raise MissingDependencyError.of(purpose, "langchain-openai", "bench") from error
    key: Any = os.environ.get("OPENAI_API_KEY", "none")
    return ChatOpenAI(model=model, base_url=url, api_key=key, temperature=0)


def _asking(llm: Any) -> Callable[[str], str]:
    # LangChain's models are asked with invoke, LlamaIndex's with complete
    ask = getattr(llm, "invoke", None) or getattr(llm, "complete", None)
    if ask is None:
        raise InvalidInputError(
            f"A reader is a LangChain chat model or a LlamaIndex LLM, not {type(llm).__name__}."
        )
    return lambda text: _text(ask(text))


def _text(reply: Any) -> str:
    """The text of a LangChain message, of a LlamaIndex response, or of a plain string."""
    content = getattr(reply, "content", None)
    if content is None:
        content = getattr(reply, "text", reply)
    if isinstance(content, list):  # blocks of several kinds
        content = "".join(b if isinstance(b, str) else b.get("text", "") for b in content)
    return str(content).strip()
