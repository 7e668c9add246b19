"""What the benchmarks share: ways to retrieve, searches that are made once, files of results."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import bm25s
import figures
import numpy as np
import torch
from machine import made_from, model_digest, report
from tqdm import tqdm

from qrag_retriever import QRAGModel, SearchOptions
from qrag_retriever.errors import ReaderError
from qrag_retriever.offline import DEFAULT_ENCODER
from qrag_retriever.q_values import best_actions
from qrag_retriever.search import Beam, Pick
from qrag_train.evaluation import EmbeddedTexts, in_groups, judge, search_samples, steps_above
from qrag_train.journal import Journal, content_key
from qrag_train.reading import Reader, Task, openai_compatible
from qrag_train.report import markdown, untrained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from qrag_train.data import SupportSample
    from qrag_train.reading import Benchmark

# Questions between two saves.
_BATCH = 16
# Rows of a table over thresholds.
_THRESHOLDS = 31


class Found(NamedTuple):
    """What one search found.

    Attributes:
        id: Name of the question.
        question: The question.
        answer: Its answer, if the data have one.
        other_answers: Others that are right too.
        support: The support chunks.
        retrieved: The chunks retrieved, in order.
        q_values: Q of each, or another method's score.
        texts: The chunks' texts.
    """

    id: str
    question: str
    answer: str | None
    other_answers: tuple[str, ...]
    support: list[int]
    retrieved: list[int]
    q_values: list[float]
    texts: list[str]

    @property
    def beam(self) -> Beam:
        pairs = zip(self.retrieved, self.q_values, strict=True)
        return Beam(tuple(Pick(i, chunk, q, ()) for i, (chunk, q) in enumerate(pairs, start=1)))

    def task(self, q_threshold: float | None) -> Task:
        """The question for a reader, with the chunks above a threshold."""
        pairs = list(zip(self.retrieved, self.texts, strict=True))
        passages = [text for _, text in sorted(pairs[: steps_above(self.beam, q_threshold)])]
        return Task(self.question, passages, str(self.answer), self.other_answers)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to retrieve.

    Attributes:
        name: For tables.
        k: Number of chunks it retrieves.
        key: Stands for everything else that its results depend on.
        search: Gives the chunks retrieved for each sample and their scores.
        q_threshold: Where its model stops; ``None``: never, or it is not greedy.
        read: Whether a reader answers from what it found.
    """

    name: str
    k: int
    key: str
    search: Callable[[Sequence[SupportSample]], list[Beam]]
    q_threshold: float | None = None
    read: bool = False


class Judged:
    """A model, with the embeddings of texts that recur.

    Args:
        name: Its name in tables.
        model: The model.
        texts: Texts that recur in many questions.
    """

    def __init__(self, name: str, model: QRAGModel, texts: Iterable[str] = ()) -> None:
        self.name = name
        self.model = model
        self.digest = model_digest(model)
        self._embedded = EmbeddedTexts(model, texts)

    def steps(
        self, k: int, beams: int = 1, q_threshold: float | None = None, *, read: bool = False
    ) -> Method:
        """Retrieval in k steps, greedy or with several beams (paper App. C)."""
        plan = f", {beams} beams" if beams > 1 else ""
        own = self.model.config.q_threshold if q_threshold is None else q_threshold
        threshold = own if beams == 1 else None
        options = SearchOptions(k, beams=beams, runners_up=0)
        return self._method(f"{k} steps{plan}", options, threshold, read)

    def once(self, k: int) -> Method:
        """Ordinary dense retrieval: the best k chunks of the first step."""
        options = SearchOptions(k, chunks_per_step=k, runners_up=0)
        return self._method(f"the best {k} of one step", options)

    def _method(
        self, name: str, options: SearchOptions, threshold: float | None = None, read: bool = False
    ) -> Method:
        def search(samples: Sequence[SupportSample]) -> list[Beam]:
            return search_samples(self.model, samples, options, self._embedded)

        key = content_key(self.digest, options)
        return Method(f"{self.name}: {name}", options.k, key, search, threshold, read)


def bm25(k: int) -> Method:
    """The k chunks that BM25 ranks first (Lucene's variant, k1 = 1.5, b = 0.75)."""
    indexed: list[Any] = [None, None]  # the last corpus and its index

    def search(samples: Sequence[SupportSample]) -> list[Beam]:
        return [one(sample) for sample in samples]

    def one(sample: SupportSample) -> Beam:
        if sample.chunks is not indexed[0]:
            index, tokens = bm25s.BM25(), words(sample.chunks)
            # it cannot index texts that have nothing but stop words
            index.index(tokens if any(tokens) else [["-"] for _ in tokens], show_progress=False)
            indexed[:] = sample.chunks, index
        scores = indexed[1].get_scores(words([sample.question])[0])
        best = best_actions(scores, min(k, len(scores)))
        return Beam(tuple(Pick(1, i, float(scores[i]), ()) for i in best))

    return Method("BM25", k, content_key("bm25", bm25s.__version__, k), search)


def words(texts: Sequence[str]) -> list[list[str]]:
    return bm25s.tokenize(list(texts), return_ids=False, show_progress=False)


class Results:
    """The rows of a benchmark, and the journal of the searches they are made from.

    Args:
        options: What `add_options` asked for.
        benchmark: Whose prompt a reader gets.
    """

    def __init__(self, options: argparse.Namespace, benchmark: Benchmark) -> None:
        torch.set_num_threads(options.threads)
        self._options = options
        self._journal = Journal(options.journal or options.json.with_suffix(".journal.jsonl"))
        self._benchmark = benchmark
        self._corpus: tuple[tuple[str, ...], str] = ((), "")
        self.rows: list[dict[str, Any]] = []
        self._stopping: dict[str, list[dict[str, float]]] = {}
        self._q_over_steps: dict[str, list[dict[str, Any]]] = {}
        self._to_read: list[tuple[dict[str, Any], list[Task]]] = []

    def search(self, method: Method, samples: Iterable[SupportSample], count: int) -> list[Found]:
        """Search for all samples, apart from those in the journal.

        Args:
            method: How.
            samples: What; read once, a few at a time.
            count: Number of samples.
        """
        found: list[Found] = []
        with tqdm(total=count, desc=method.name, unit="question", mininterval=1) as bar:
            for group in in_groups(samples):
                for first in range(0, len(group), _BATCH):
                    found += self._found(method, group[first : first + _BATCH])
                    bar.update(len(found) - bar.n)
        return found

    def measure(
        self, method: Method, samples: Iterable[SupportSample], count: int, **row: Any
    ) -> list[Found]:
        """`search`, and add a row for the table, which says ``row`` besides."""
        found = self.search(method, samples, count)
        row["questions"] = len(found)
        self.rows.append({**row, "retrieval": method.name, **scores(found, method.k)})
        if method.q_threshold is not None:
            name = f"{method.name}, until Q < {method.q_threshold:.3f}"
            stopped = scores(found, method.k, method.q_threshold)
            self.rows.append({**row, "retrieval": name, **stopped})
        if method.read:
            answered = [one for one in found if one.answer is not None]
            if tasks := [one.task(method.q_threshold) for one in answered]:
                self._to_read.append((self.rows[-1], tasks))
        return found

    def _found(self, method: Method, samples: Sequence[SupportSample]) -> list[Found]:
        keys = [
            content_key(method.key, s.question, self._corpus_key(s.chunks), s.support)
            for s in samples
        ]
        journal = self._journal
        missing = {key: s for key, s in zip(keys, samples, strict=True) if key not in journal}
        if missing:
            beams = method.search(list(missing.values()))
            for (key, sample), beam in zip(missing.items(), beams, strict=True):
                texts = [sample.chunks[i] for i in beam.retrieved]
                q_values = [pick.q_value for pick in beam.picks]
                journal[key] = [list(beam.retrieved), q_values, texts]
        return [
            Found(s.id, s.question, s.answer, s.other_answers, list(s.support), *journal[key])
            for key, s in zip(keys, samples, strict=True)
        ]

    def _corpus_key(self, chunks: tuple[str, ...]) -> str:
        if chunks is not self._corpus[0]:  # many questions may share one large corpus
            self._corpus = chunks, content_key(chunks)
        return self._corpus[1]

    def follow(self, name: str, found: Sequence[Found], k: int) -> None:
        """Add what greedy searches tell of stopping (paper App. B) and of Q over the steps."""
        self._stopping[name] = stopping(found, k)
        self._q_over_steps[name] = q_over_steps(found, k)

    def write(self, models: Sequence[Judged], files: Iterable[Path], **more: Any) -> None:
        """Write everything as JSON, Markdown tables and plots; then with the reader's answers.

        Args:
            models: The models judged; their digests are written down.
            files: The data; their SHA-256 is.
            **more: Further figures.

        Raises:
            SystemExit: If answers are missing; everything is written before.
        """
        options = self._options
        more |= made_from({judged.name: judged.digest for judged in models}, files)
        more |= {"stopping": self._stopping, "q_over_steps": self._q_over_steps}
        self._write(more)
        if self._stopping:
            figures.stops(self._stopping, options.json)
            figures.q_values(self._q_over_steps, options.json)
        errors: list[ReaderError] = []
        if options.reader is not None:
            llm = openai_compatible(options.reader_url, options.reader)
            reader = Reader(llm, f"{options.reader} at {options.reader_url}", self._journal)
            try:
                errors = self._read(reader)
            finally:
                self._write(more)
        print(markdown(self.rows))
        if errors:
            raise SystemExit(f"error: {errors[-1]}\n{self._unread()}") from errors[-1]

    def _read(self, reader: Reader) -> list[ReaderError]:
        """Score what the reader answers of each row, and note how much it does not."""
        errors: list[ReaderError] = []
        responds = True
        for row, tasks in self._to_read:
            if responds or not reader.missing(self._benchmark, tasks):
                try:
                    row.update(reader.scores(self._benchmark, tasks))
                except ReaderError as error:
                    errors.append(error)
                    responds = reader.responds()
            if missing := reader.missing(self._benchmark, tasks):
                row["answers_missing"] = missing
        return errors

    def _unread(self) -> str:
        """The rows that have no scores of the reader."""
        lines = [
            f"  {row['data']}; {row['retrieval']}: {row['answers_missing']} of {len(tasks)}"
            for row, tasks in self._to_read
            if "answers_missing" in row
        ]
        return "\n".join(["Not scored, because answers are missing:", *lines])

    def _write(self, more: dict[str, Any]) -> None:
        options = self._options
        report(options.json, options.seed, rows=self.rows, **more)
        parts = [markdown(self.rows)]
        parts += [f"{name}\n\n{markdown(rows)}" for name, rows in self._stopping.items()]
        options.json.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def scores(found: Sequence[Found], k: int, q_threshold: float | None = None) -> dict[str, float]:
    """Means over the questions, see `qrag_train.evaluation.judge`."""
    beams = [one.beam for one in found]
    values = judge(beams, [one.support for one in found], k, q_threshold)
    return {name: round(value, 4) for name, value in values.items()}


def stopping(found: Sequence[Found], k: int) -> list[dict[str, float]]:
    """Early, perfect and late stops at thresholds from the lowest Q to the highest (App. B)."""
    q_values = [q for one in found for q in one.q_values]
    names = ("fact_em", "fact_f1", "steps", "stop_early", "stop_perfect", "stop_late")
    rows = []
    for threshold in np.linspace(min(q_values), max(q_values), _THRESHOLDS).tolist():
        values = scores(found, k, threshold)
        rows.append({"q_threshold": round(threshold, 4)} | {name: values[name] for name in names})
    return rows


def q_over_steps(found: Sequence[Found], k: int) -> list[dict[str, Any]]:
    """Mean Q of the chunk taken at each step, while support was missing and afterwards."""
    rows = []
    for step in range(k):
        parts: dict[bool, list[float]] = {False: [], True: []}
        for one in found:
            if step < len(one.retrieved):
                complete = set(one.support) <= set(one.retrieved[:step])
                parts[complete].append(one.q_values[step])
        means = {done: round(sum(q) / len(q), 4) if q else None for done, q in parts.items()}
        row = {"step": step + 1, "missing": means[False], "complete": means[True]}
        rows.append({**row, "share_complete": round(len(parts[True]) / len(found), 4)})
    return rows


def length_options(parser: argparse.ArgumentParser) -> None:
    """Add what benchmarks of long texts take."""
    parser.add_argument("--background", type=Path, required=True, help="folder of unseen books")
    parser.add_argument("--count", type=int, default=200, help="questions of each length")
    parser.add_argument(
        "--baselines-to",
        type=int,
        default=32_768,
        metavar="TOKENS",
        help="greatest length at which BM25 and the untrained encoder, which are slow, are judged",
    )


def load_all(paths: Sequence[Path], texts: Iterable[str]) -> list[Judged]:
    """Several models; no two may have one name, which stands for them in tables and plots.

    Raises:
        SystemExit: If two have.
    """
    models = [load(path, texts) for path in paths]
    names = [model.name for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SystemExit(f"Two models are called {twice[0]!r}; rename the folder of one.")
    return models


def load(path: Path, texts: Iterable[str]) -> Judged:
    """A model of the package by its name, of a folder or of a run, which names its model."""
    if not path.exists():  # a name, as of a packaged model
        return Judged(path.name, QRAGModel.from_pretrained(str(path)), texts)
    path = path.resolve()
    folder = path / "model" if (path / "model").is_dir() else path
    name = folder.parent.name if folder.name == "model" else folder.name
    return Judged(name, QRAGModel.from_pretrained(folder), texts)


def start_of(model: QRAGModel | None, encoder: str | None, texts: Iterable[str]) -> Judged:
    """The encoder to compare with: as named, or the model's own before training, or MiniLM.

    MiniLM has its name in the tables where it stands in for a start that is not to be had.
    """
    before = None if model is None or encoder is not None else untrained(model)
    positions = "none" if model is None else model.config.positions
    stand_in = model is not None and encoder is None and before is None
    name = f"untrained {DEFAULT_ENCODER.rpartition('/')[2]}" if stand_in else "untrained"
    return Judged(name, before or QRAGModel.from_encoder(encoder, positions), texts)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all benchmarks take."""
    parser.add_argument(
        "--encoder", help="untrained embedder to compare with; left out: the model's start"
    )
    parser.add_argument("--reader", help="LLM that answers from what was found; left out: none")
    parser.add_argument("--reader-url", help="its address, such as http://localhost:8000/v1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument(
        "--journal", type=Path, help="file of single searches; left out: beside the figures"
    )
