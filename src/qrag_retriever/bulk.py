"""Embedding a corpus with Ray Data: on several processes, GPUs or machines."""

from __future__ import annotations

import contextlib
import importlib.util
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrag_retriever.chunk import to_chunks
from qrag_retriever.errors import (
    FingerprintMismatchError,
    InvalidInputError,
    MissingDependencyError,
    QRAGError,
)
from qrag_retriever.index import ChunkIndex
from qrag_retriever.model import QRAGModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    # a column of a batch by its name
    Batch = dict[str, NDArray[Any]]


# Of each worker, for Ray's books: less than one, so that on a machine with as many cores as workers
# something is left for reading and writing, without which the workers would wait for ever.
_CPUS = 0.5
_COMPARED = 8  # texts embedded again to see that the embeddings are the model's
_TOLERANCE = 0.02  # of an embedding's length: workers may compute in half precision
_NO_ROWS = "The dataset has no rows; give at least one text."


class ChunkEmbedder:
    """A worker that keeps a model and embeds batches, for ``Dataset.map_batches``.

    Args:
        model: Folder or hub name of a Q-RAG model.
        device: Where to compute; ``None``: a GPU if the worker has one.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        self._model = QRAGModel.from_pretrained(model, device=device)

    def __call__(self, batch: Batch) -> Batch:
        """Add the column ``embedding`` to a batch with the column ``text``."""
        embeddings = self._model.encode_actions(_texts(batch))
        return {**batch, "embedding": embeddings}


class StoreWriter:
    """A worker that keeps a vector store and writes batches into it, for ``Dataset.map_batches``.

    A batch that is written again because its worker died takes the place of the first: ids count.

    Args:
        open_store: Makes a LangChain vector store whose embedding is `QRAGEmbeddings`; called in
            the worker.
    """

    def __init__(self, open_store: Callable[[], Any]) -> None:
        self._store = open_store()

    def __call__(self, batch: Batch) -> Batch:
        """Write a batch with the columns ``id`` and ``text``; all other columns are metadata.

        Raises:
            InvalidInputError: If a text is no text, or an id none or neither a text nor an integer.
        """
        others = [name for name in batch if name not in ("id", "text")]
        ids = _ids(batch)
        if not all(ids):
            raise InvalidInputError("A row has no id; give every chunk one to fill a store.")
        if getattr(self._store, "col", None) is not None:  # Milvus, which would keep both
            self._store.delete(ids=ids)
        self._store.add_texts(_texts(batch), _rows(batch, others), ids=ids)
        return {"id": batch["id"]}


def embed_dataset(
    dataset: Any,
    model: str | Path,
    *,
    workers: int = 2,
    gpus: float = 0,
    batch_size: int = 1024,
) -> Any:
    """A Ray dataset with the embeddings of its texts.

    Ray restarts a worker that dies and gives its batches to the others. Written with
    ``write_parquet``, the result can be read again without embedding anew.

    Args:
        dataset: A ``ray.data.Dataset`` with the column ``text``.
        model: Folder or hub name of a Q-RAG model, where all workers can read it.
        workers: Number of them.
        gpus: GPUs of each; 0: it computes on a CPU.
        batch_size: Texts that a worker gets at once.

    Returns:
        The dataset with a further column ``embedding``, computed when it is read.

    Raises:
        InvalidInputError: If there is no column ``text``.
        MissingDependencyError: If Ray is not installed.
    """
    _needs_ray()
    from ray.data import ActorPoolStrategy

    _check_columns(dataset.columns(), ("text",))
    return dataset.map_batches(
        ChunkEmbedder,
        fn_constructor_kwargs={"model": str(model), "device": "cuda" if gpus else "cpu"},
        compute=ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        num_cpus=_CPUS,
        batch_size=batch_size,
    )


def fill_store(
    dataset: Any,
    open_store: Callable[[], Any],
    *,
    workers: int = 2,
    gpus: float = 0,
    batch_size: int = 1024,
) -> int:
    """Embed a Ray dataset straight into a vector store.

    Args:
        dataset: A ``ray.data.Dataset`` with the columns ``id`` and ``text``; all others become
            metadata.
        open_store: Makes a LangChain vector store whose embedding is `QRAGEmbeddings`, on a server
            that all workers reach.
        workers: Number of them.
        gpus: GPUs of each; 0: it computes on a CPU.
        batch_size: Texts that a worker gets at once.

    Returns:
        Number of chunks written.

    Raises:
        InvalidInputError: If a column is missing.
        MissingDependencyError: If Ray is not installed.
    """
    _needs_ray()
    from ray.data import ActorPoolStrategy

    _check_columns(dataset.columns(), ("id", "text"))
    written = dataset.map_batches(
        StoreWriter,
        fn_constructor_kwargs={"open_store": open_store},
        compute=ActorPoolStrategy(size=workers),
        num_gpus=gpus,
        num_cpus=_CPUS,
        batch_size=batch_size,
    )
    with _own_errors():
        return int(written.count())


def index_of(dataset: Any, model: QRAGModel, *, order_by: str | None = None) -> ChunkIndex:
    """An index of a dataset that `embed_dataset` made.

    Args:
        dataset: With the columns ``text`` and ``embedding``, and ``id`` if chunks have ids; all
            others become metadata, timestamps as text (ISO 8601).
        model: The model that embedded it.
        order_by: Column by which chunks are put in document order, such as their number; ``None``:
            as the rows arrive. Ray hands them out as they are ready, unless its data context says
            ``execution_options.preserve_order``.

    Raises:
        InvalidInputError: If a column is missing or holds something else, there are no rows, or
            the model has positions and nothing says in which order the rows are; and see
            `ChunkIndex.from_embeddings`.
        FingerprintMismatchError: If another model made the embeddings.
    """
    ray_options = getattr(getattr(dataset, "context", None), "execution_options", None)
    kept = getattr(ray_options, "preserve_order", True)
    config = model.config
    ordered = config.positions != "none" or config.state_order == "document"
    if order_by is None and not kept and ordered:
        raise InvalidInputError(
            f"A model with positions={config.positions!r} and state_order={config.state_order!r} "
            "needs the chunks in document order, which Ray does not keep; give order_by=, a column "
            "with each chunk's number."
        )
    texts: list[str] = []
    metadatas: list[dict[str, Any]] = []
    ids: list[str | None] = []
    parts: list[NDArray[np.float32]] = []
    places: list[NDArray[Any]] = []
    needed = ("text", "embedding", *([] if order_by is None else [order_by]))
    with _own_errors():
        for batch in dataset.iter_batches(batch_format="numpy"):
            _check_columns(list(batch), needed)
            if order_by is not None:
                places.append(np.asarray(batch[order_by]))
            parts.append(np.stack(list(batch["embedding"])).astype(np.float32, copy=False))
            others = [name for name in batch if name not in ("id", "text", "embedding")]
            texts += _texts(batch)
            ids += _ids(batch)
            metadatas += _rows(batch, others)
    if not texts:
        raise InvalidInputError(_NO_ROWS)
    embeddings = np.concatenate(parts)
    _check_model(texts, embeddings, model)
    if places:
        order = np.argsort(_numbers(np.concatenate(places), str(order_by)), kind="stable")
        embeddings = embeddings[order]
        texts, metadatas = [texts[i] for i in order], [metadatas[i] for i in order]
        ids = [ids[i] for i in order] if ids else ids
    chunks = to_chunks(texts, metadatas=metadatas, ids=ids or None)
    return ChunkIndex.from_embeddings(chunks, embeddings, model=model)


def _texts(batch: Batch) -> list[str]:
    texts: list[Any] = batch["text"].tolist()
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise InvalidInputError(
            f"The column text holds {wrong[0]!r}, which is no text; leave such rows out."
        )
    return texts


def _ids(batch: Batch) -> list[str | None]:
    """The ids of a batch as texts, ``None`` for rows without; [] without the column."""
    ids: list[Any] = batch["id"].tolist() if "id" in batch else []
    if wrong := [id_ for id_ in ids if not isinstance(id_, (str, int, type(None)))]:
        raise InvalidInputError(
            f"The column id holds {wrong[0]!r}; give texts or integers (a column of integers in "
            "which one is missing becomes one of floats)."
        )
    return [None if id_ is None else str(id_) for id_ in ids]


def _numbers(places: NDArray[Any], name: str) -> NDArray[Any]:
    """What chunks are ordered by, if that is numbers or times."""
    if places.dtype == object:
        places = np.array(places.tolist())
    if places.dtype.kind not in "iufM" or np.isnan(places).any():
        raise InvalidInputError(
            f"The column {name} must hold a number or a time for every row, to put chunks in order."
        )
    return places


def _rows(batch: Batch, names: list[str]) -> list[dict[str, Any]]:
    """Some columns row by row, NumPy's values as Python's own."""
    values = zip(*(_plain(batch[name]) for name in names), strict=True)
    rows = [dict(zip(names, row, strict=True)) for row in values]
    return rows or [{} for _ in batch["text"]]


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind == "M":  # nanoseconds would become integers
            times: NDArray[np.datetime64] = np.atleast_1d(value)
            texts = np.datetime_as_string(times).astype(object)
            texts[np.isnat(times)] = None
            value = texts.reshape(value.shape)
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value.isoformat() if isinstance(value, (date, time)) else value


def _check_model(texts: list[str], embeddings: NDArray[np.float32], model: QRAGModel) -> None:
    """Embed some texts again and compare."""
    some = np.unique(np.linspace(0, len(texts) - 1, _COMPARED).astype(int))
    again = model.encode_actions([texts[i] for i in some])
    given = embeddings[some]
    far = np.full(len(some), np.inf)
    if given.shape == again.shape:
        far = np.linalg.norm(given - again, axis=1)
    if not (far <= _TOLERANCE * np.linalg.norm(again, axis=1)).all():
        raise FingerprintMismatchError(
            "The embeddings are not this model's: it embeds some of the texts otherwise. Give the "
            "model that embed_dataset had, or embed the texts again."
        )


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """What a worker refused as the error that it is, not as Ray's with the worker's stack."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, QRAGError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise cause from error


def _check_columns(columns: list[str] | None, needed: tuple[str, ...]) -> None:
    if columns is None:
        raise InvalidInputError(_NO_ROWS)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise InvalidInputError(
            f"The dataset has the columns {', '.join(columns)} and lacks {', '.join(missing)}; "
            "rename or add them."
        )


def _needs_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise MissingDependencyError.of("Bulk embedding", "Ray Data", "ray")
