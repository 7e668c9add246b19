"""What was retrieved at each step and why; shows itself as text, HTML and a plot."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from qrag_retriever.errors import InvalidInputError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from qrag_retriever.chunk import Chunk
    from qrag_retriever.search import StopReason

# Control characters, and those that turn the direction of writing.
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_STOPPED = {
    "budget": "the budget was used up",
    "threshold": "the best Q fell below the threshold",
    "exhausted": "no candidate was left",
}


@dataclasses.dataclass(frozen=True, slots=True)
class RunnerUp:
    """A chunk that came close: its id, its number in the index, its Q."""

    chunk_id: str
    index: int
    q_value: float


@dataclasses.dataclass(frozen=True)
class Step:
    """One chunk retrieved.

    Attributes:
        step: Number of the step, from 1; chunks taken from one state share it.
        chunk: The chunk.
        index: Its number in the index, from 0, in document order; of a second stage its rank among
            what the other retriever found; -1 where a vector store does not tell.
        q_value: Q of taking it in the state of that step.
        position: ρ at that step (paper eq. 6): its place among the chunks found before.
        runners_up: The next best chunks of that step.
    """

    step: int
    chunk: Chunk
    index: int
    q_value: float
    position: float
    runners_up: tuple[RunnerUp, ...] = ()

    @property
    def chunk_id(self) -> str:
        """Id of the chunk."""
        return self.chunk.id

    @property
    def text(self) -> str:
        """Text of the chunk."""
        return self.chunk.text

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the chunk."""
        return self.chunk.metadata

    def to_dict(self) -> dict[str, Any]:
        """The step as plain values."""
        return {
            "step": self.step,
            "chunk_id": self.chunk_id,
            "index": self.index,
            "text": self.text,
            "metadata": dict(self.metadata),
            "q_value": self.q_value,
            "position": self.position,
            "runners_up": [dataclasses.asdict(other) for other in self.runners_up],
        }


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The steps of one search, in order of retrieval.

    Iterating gives the steps; ``print`` a table; a notebook shows it as HTML.

    Attributes:
        query: The query.
        steps: What was retrieved.
        stopped: Why it ended: ``"budget"``, ``"threshold"`` or ``"exhausted"``.
        n_candidates: Number of chunks to choose from; ``None`` where a vector store did not have to
            count them.
        q_values: Q of every candidate at each step, float32 ``[n_candidates]`` each, ``-inf`` where
            a chunk could not be taken; empty unless kept, and for a vector store, which tells of
            the best alone.
        candidates: Numbers in the index of the candidates; ``None``: all.
    """

    query: str
    steps: tuple[Step, ...]
    stopped: StopReason
    n_candidates: int | None
    q_values: tuple[NDArray[np.float32], ...] = dataclasses.field(
        default=(), repr=False, compare=False
    )
    candidates: NDArray[np.int64] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @property
    def chunk_ids(self) -> list[str]:
        """Ids of the retrieved chunks, in order."""
        return [step.chunk_id for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """The trajectory as plain values, fit for JSON where the metadata are."""
        return {
            "query": self.query,
            "stopped": self.stopped,
            "n_candidates": self.n_candidates,
            "steps": [step.to_dict() for step in self.steps],
        }

    def __str__(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        lines = [f"Query: {self.query}", f"{'step':>4}  {'Q':>7}  {'ρ':>6}  {'chunk':>7}  text"]
        for step in self.steps:
            head = f"{step.step:>4}  {step.q_value:>7.3f}  {step.position:>6.2f}  {step.index:>7}  "
            text = " ".join(step.text.split())
            room = max(width - len(head), 20)
            first, *rest = textwrap.wrap(text, room, max_lines=3, placeholder=" …") or [""]
            lines.append(head + first)
            lines.extend(" " * len(head) + line for line in rest)
        lines.append(self._summary())
        # a terminal obeys some characters of a text, which may be anybody's
        return "\n".join(_OBEYED.sub("\N{REPLACEMENT CHARACTER}", line) for line in lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{step.step}</td><td>{step.q_value:.3f}</td><td>{step.position:.2f}</td>"
            f"<td title='{html.escape(step.chunk_id, quote=True)}'>{step.index}</td>"
            f"<td style='text-align:left'>{html.escape(step.text)}</td>"
            f"<td style='text-align:left'>{_runners_up(step)}</td></tr>"
            for step in self.steps
        )
        return (
            f"<p><b>{html.escape(self.query)}</b></p><table><thead><tr><th>step</th><th>Q</th>"
            "<th>ρ</th><th>chunk</th><th style='text-align:left'>text</th>"
            "<th style='text-align:left'>next best</th></tr></thead>"
            f"<tbody>{rows}</tbody></table><p>{html.escape(self._summary())}</p>"
        )

    def _summary(self) -> str:
        noun = "chunk" if len(self.steps) == 1 else "chunks"
        of = "" if self.n_candidates is None else f" of {self.n_candidates:,}"
        return f"{len(self.steps)} {noun}{of}; stopped because {_STOPPED[self.stopped]}."

    def plot(self, *, width: float = 10.0, bins: int = 1500) -> Figure:
        """Draw Q over the document, one panel a step.

        Args:
            width: Width of the figure in inches.
            bins: Longer documents are drawn by the highest Q in each of so many stretches.

        Returns:
            A matplotlib figure; ``figure.savefig("steps.png")`` stores it.

        Raises:
            InvalidInputError: If the Q-values were not kept, or nothing was retrieved, or a number
                is not positive.
            MissingDependencyError: If matplotlib is not installed.
        """
        if not isinstance(bins, int) or bins < 1 or not width > 0:
            raise InvalidInputError(
                f"width={width!r}, bins={bins!r}; give a width above 0, and bins an integer of at "
                "least 1."
            )
        if not self.steps:
            raise InvalidInputError(
                f"Nothing was retrieved (stopped: {self.stopped}), so there is nothing to draw; "
                "search with another question, or with a lower q_threshold or None."
            )
        if not self.q_values:
            raise InvalidInputError(
                "There are no Q-values to draw; search a ChunkIndex (a vector store does not tell "
                "Q of every chunk) with keep_q_values=True."
            )
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError.of("Drawing", "matplotlib", "plot") from error
        shown = self.steps[-1].step
        figure = Figure(figsize=(width, 1.0 + 1.4 * shown), layout="constrained")
        axes = figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]
        for number, (axis, q_values) in enumerate(zip(axes, self.q_values, strict=False), start=1):
            places, highest = _highest_per_bin(self._document_places(), q_values, bins)
            axis.plot(places, highest, color="0.55", linewidth=0.8)
            for step in self.steps:
                if step.step < number:
                    axis.axvline(step.index, color="tab:blue", linewidth=0.8, linestyle=":")
                elif step.step == number:
                    axis.axvline(step.index, color="tab:orange", linewidth=0.8)
                    axis.plot([step.index], [step.q_value], "o", color="tab:orange")
                    axis.set_title(
                        textwrap.shorten(f"{number}. {step.text}", max(9, int(width * 11))),
                        loc="left",
                        fontsize=9,
                        parse_math=False,
                    )
            axis.set_ylabel("Q")
        axes[-1].set_xlabel("chunk, in document order (dotted: found before)")
        title = textwrap.shorten(self.query, max(9, int(width * 9)))
        figure.suptitle(title, fontsize=11, parse_math=False)
        return figure

    def _document_places(self) -> NDArray[np.int64]:
        if self.candidates is None:
            return np.arange(len(self.q_values[0]), dtype=np.int64)
        return self.candidates


def _runners_up(step: Step) -> str:
    return "<br>".join(f"{other.index} ({other.q_value:.3f})" for other in step.runners_up)


def _highest_per_bin(
    places: NDArray[np.int64], values: NDArray[np.float32], bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The highest finite value of each of ``bins`` equal stretches, and where it lies."""
    edges = np.linspace(0, len(values), min(bins, len(values)) + 1).astype(int)[:-1]
    ends = np.append(edges[1:], len(values))
    best = [
        start + int(np.argmax(values[start:end])) for start, end in zip(edges, ends, strict=True)
    ]
    heights = values[best]
    known = np.isfinite(heights)
    return places[best][known], heights[known]
