"""The corpus: chunks and their action embeddings, in document order."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from typing_extensions import Unpack

from qrag_retriever.ann import AnnKind, check_ann
from qrag_retriever.chunk import Chunk, item_list, per_item, to_chunks
from qrag_retriever.chunk_store import MemoryChunks
from qrag_retriever.corpus import Corpus
from qrag_retriever.embedding import Embedding, embed_new
from qrag_retriever.errors import FingerprintMismatchError, IndexFormatError, InvalidInputError
from qrag_retriever.index_change import IndexChange
from qrag_retriever.locks import Lock
from qrag_retriever.saved_index import SavedIndex, load_again, make_again
from qrag_retriever.snapshot import Snapshot
from qrag_retriever.storage import IndexContent, read_index, write_index
from qrag_retriever.vectors import (
    StorageType,
    StoredVectors,
    check_storage_type,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qrag_retriever.candidates import Candidates
    from qrag_retriever.chunk_store import ChunkSequence
    from qrag_retriever.model import QRAGModel
    from qrag_retriever.search import SearchOptions

__all__ = ["ChunkIndex", "Snapshot"]


class ChunkIndex(Corpus):
    """Chunks with the embeddings that the action encoder E_a gives them.

    The order of the chunks is that of the document: new chunks come last, a changed chunk keeps its
    place. All methods may be called from several threads; a reader takes a :meth:`snapshot`, which
    no later change touches. ``copy`` and ``deepcopy`` give the index itself. The pickle of an index
    that is as it was saved names the folder; any other holds the whole corpus. Both hold the model.

    Args:
        model: Embeds the chunks; an index belongs to one model. A `QRAGModel`, or folder or hub
            name of one, or of any embedder to use untrained; ``None``: multihop-en.
        ann: ``"none"``: every search looks at every chunk; ``"flat"``, ``"hnsw"`` or ``"ivfpq"``:
            a FAISS index proposes candidates, for models without positions only. It is built when
            first needed, and again after a change.
        dtype: How embeddings are stored: ``"float32"``, ``"bfloat16"``, ``"float16"`` (half the
            size) or ``"int8"`` (a quarter, and faster to search).

    Raises:
        ConfigError: If ``ann`` is unknown or the model has positions.
        InvalidInputError: If ``dtype`` is unknown.

    Attributes:
        model: The model.
        ann: The kind of FAISS index, or ``"none"``.
        dtype: How embeddings are stored.
        fingerprint: Of the model, when the index was made.
        saved: Where it was saved or loaded last, if it was.
    """

    def __init__(
        self,
        model: QRAGModel | str | Path | None = None,
        *,
        ann: AnnKind = "none",
        dtype: StorageType = "float32",
    ) -> None:
        model = _embedder(model)
        check_ann(ann, model.config)
        check_storage_type(dtype)
        self.model = model
        self.ann: AnnKind = ann
        self.dtype: StorageType = dtype
        self.fingerprint = model.fingerprint
        self._lock = Lock()  # held while the index changes
        self._saving = Lock()  # held while it is saved
        self.saved: SavedIndex | None = None
        self._generations: dict[Path, str] = {}  # of folders it was loaded from or saved to
        nothing = np.empty((0, model.dimension), dtype=np.float32)
        self._snapshot = self._view(MemoryChunks(), StoredVectors.of(nothing, dtype), 0)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        metadatas: Iterable[Mapping[str, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        model: QRAGModel | str | Path | None = None,
        ann: AnnKind = "none",
        dtype: StorageType = "float32",
        **embedding: Unpack[Embedding],
    ) -> ChunkIndex:
        """Make an index of texts.

        Args:
            texts: The chunks in document order; equal texts are all kept and embedded once.
            metadatas: One mapping per text, for filters.
            ids: One id per text; by default made from the text, the same in every run.
            model: See the class.
            ann: See the class.
            dtype: See the class.
            **embedding: ``show_progress``, ``devices`` and ``checkpoint``, see `Embedding`.

        Raises:
            InvalidInputError: If there are no texts, and see :meth:`add`.
        """
        index = cls(model, ann=ann, dtype=dtype)
        if not index.add(texts, metadatas=metadatas, ids=ids, **embedding):
            raise InvalidInputError("There are no chunks; give at least one text.")
        return index

    @classmethod
    def from_documents(
        cls,
        items: Iterable[object],
        *,
        model: QRAGModel | str | Path | None = None,
        ann: AnnKind = "none",
        dtype: StorageType = "float32",
        **embedding: Unpack[Embedding],
    ) -> ChunkIndex:
        """Make an index of Documents, nodes, chunks and texts, in any mix; as :meth:`from_texts`.

        Raises:
            InvalidInputError: If there are none, and see :meth:`add`.
        """
        index = cls(model, ann=ann, dtype=dtype)
        if not index.add(items, **embedding):
            raise InvalidInputError(
                "There are no chunks; give at least one Document, node, chunk or text."
            )
        return index

    @classmethod
    def from_embeddings(
        cls,
        items: Iterable[object],
        embeddings: NDArray[Any],
        *,
        model: QRAGModel | str | Path | None = None,
        ann: AnnKind = "none",
        dtype: StorageType = "float32",
    ) -> ChunkIndex:
        """Make an index of chunks whose embeddings are known already.

        Args:
            items: As for :meth:`from_documents`.
            embeddings: What ``model.encode_actions`` gives for them, ``[N, d]``.
            model: The model that made them.
            ann: See the class.
            dtype: See the class.

        Raises:
            InvalidInputError: If the embeddings have another shape or are not finite, and see
                :meth:`add`.
        """
        index = cls(model, ann=ann, dtype=dtype)
        chunks = to_chunks(items)
        shape = len(chunks), index.model.dimension
        new = StoredVectors.checked(embeddings, shape, "embeddings", dtype)
        change = IndexChange(chunks)
        index._publish(*change.applied(MemoryChunks(), index._snapshot.vectors, new))
        return index

    def add(
        self,
        items: Iterable[object],
        *,
        metadatas: Iterable[Mapping[str, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        **embedding: Unpack[Embedding],
    ) -> list[str]:
        """Add chunks at the end, or change those whose ids are there already.

        A chunk with a known id replaces the one there, in its place; if nothing about it differs,
        nothing happens. A text that the index holds is not embedded again. If anything fails, the
        index stays as it was. The first change to a loaded index brings its chunks into memory.

        Args:
            items: Texts, Documents, nodes or chunks, in any mix.
            metadatas: One mapping per item; only for texts.
            ids: One id per item, in place of its own; an item without any gets one made from its
                text, always a new one: it is appended, even if the index holds the same text.
            **embedding: ``show_progress``, ``devices`` and ``checkpoint``, see `Embedding`.

        Returns:
            The ids of all items, in their order.

        Raises:
            InvalidInputError: If an item cannot be used, an id is given twice, lengths differ, or
                the model returns something other than finite vectors of its dimension.
            FingerprintMismatchError: If the model was changed since the index was made.
        """
        # what generators do, which may be to change the index, is done before its change begins
        items = item_list(items)
        metadatas = per_item("metadatas", metadatas, len(items))
        ids = per_item("ids", ids, len(items))
        with self._lock:
            old = self._in_memory()
            chunks = to_chunks(
                items, metadatas=metadatas, ids=ids, taken=lambda id_: old.find(id_) is not None
            )
            change = IndexChange.between(old, chunks)
            vectors = self._embed(old, change.to_embed, embedding)
            if change:
                self._publish(*change.applied(old, self._snapshot.vectors, vectors))
        return [chunk.id for chunk in chunks]

    def delete(self, ids: Iterable[str]) -> None:
        """Remove chunks; those behind them move up.

        Args:
            ids: Ids of chunks in the index.

        Raises:
            InvalidInputError: If an id is not in the index. Nothing is removed then.
        """
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise InvalidInputError(f"Give a list of ids; got {ids!r}.")
        ids = list(ids)
        if foreign := [id_ for id_ in ids if not isinstance(id_, str)]:
            raise InvalidInputError(f"An id is a str; got {foreign[0]!r}.")
        with self._lock:
            old = self._in_memory()
            found = [(id_, old.find(id_)) for id_ in ids]
            unknown = [id_ for id_, row in found if row is None]
            if unknown:
                raise InvalidInputError(
                    f"No chunk has the id {', '.join(map(repr, unknown[:10]))}"
                    f"{' …' if len(unknown) > 10 else ''}; nothing was deleted."
                )
            removed = {row for _, row in found}
            if removed:
                kept = [row for row in range(len(old)) if row not in removed]
                chunks = (old[row] for row in kept)
                self._publish(MemoryChunks(chunks), self._snapshot.vectors.take(kept))

    def snapshot(self) -> Snapshot:
        """The chunks and embeddings of this moment; the same object until the index changes."""
        return self._snapshot

    def candidates(
        self,
        queries: Sequence[str],
        model: QRAGModel,
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
    ) -> Sequence[Candidates]:
        """See `Corpus`; all queries choose from the chunks of this moment.

        Raises:
            InvalidInputError: See `Corpus`, and if an excluded id is unknown.
            ConfigError: If there is an approximate index, and the model has positions.
        """
        from qrag_retriever.candidates import SnapshotCandidates

        check_ann(self.ann, model.config)
        if len(self) == 0:
            raise InvalidInputError("The index holds no chunks; add some before searching.")
        own = SnapshotCandidates(
            self._snapshot, model, options, filter=filter, exclude_ids=exclude_ids
        )
        return [own] * len(queries)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save the index in a folder, in place of the index that may be there.

        Until the very end the folder holds the old index, from then on the new one, whatever
        happens; processes that have loaded the old one keep it.

        Args:
            path: A new or empty folder, or one with an index.
            overwrite: Save even if someone else has saved to the folder since this index was
                loaded from it or saved there; their changes are lost.

        Raises:
            InvalidInputError: If the folder holds something else, someone else has saved to it, a
                chunk's metadata is not JSON, or its text is not valid Unicode. Nothing is written
                then. (Tuples are saved as lists.)
            OSError: If the folder cannot be written to, or the disk is full.
        """
        folder = Path(path).expanduser()
        with self._saving:
            snapshot = self._snapshot
            ann = None if self.ann == "flat" else snapshot.ann
            content = IndexContent(
                chunks=snapshot.chunks,
                vectors=snapshot.vectors,
                fingerprint=self.fingerprint,
                ann_kind=self.ann,
                ann=None if ann is None else ann.to_bytes(),
            )
            known = self._generations.get(folder.resolve())
            generation = write_index(folder, content, None if overwrite else known)
            self._remember(SavedIndex(folder.resolve(), generation, snapshot.version))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: QRAGModel | str | Path | None = None,
        verify: bool = False,
    ) -> ChunkIndex:
        """Open a saved index. Texts are read and embeddings mapped when they are needed.

        Args:
            path: The folder.
            model: The model that made the index.
            verify: Read all of it once and compare checksums. Otherwise the sizes of all files and
                the headers are checked.

        Raises:
            IndexFormatError: If there is no index, or it is damaged or of another version.
            FingerprintMismatchError: If another model made it.
        """
        path, model = Path(path).expanduser(), _embedder(model)
        content = read_index(path, verify=verify)
        if content.fingerprint != model.fingerprint:
            raise FingerprintMismatchError(
                f"The index in {path} was made by the model with fingerprint "
                f"{content.fingerprint}; the model given has {model.fingerprint}. Load that model, "
                "or build the index again with this one."
            )
        dimension = content.vectors.shape[1]
        if dimension != model.dimension:
            raise IndexFormatError(
                f"The index in {path} has embeddings of {dimension} dimensions, the model of "
                f"{model.dimension}. Build the index again."
            )
        index = cls(model, ann=content.ann_kind, dtype=content.vectors.dtype)
        index._snapshot = index._view(content.chunks, content.vectors, 0, content.ann)
        index._remember(SavedIndex(path.resolve(), content.generation, 0))
        return index

    def _remember(self, saved: SavedIndex) -> None:
        self.saved = saved
        self._generations[saved.folder] = saved.generation

    def _in_memory(self) -> MemoryChunks:
        chunks = self._snapshot.chunks
        return chunks if isinstance(chunks, MemoryChunks) else MemoryChunks(chunks)

    def _embed(self, old: MemoryChunks, chunks: list[Chunk], embedding: Embedding) -> StoredVectors:
        """Embeddings of chunks: those of equal texts in the index, the rest from the model."""
        texts = [chunk.embed_text for chunk in chunks]
        rows = [old.find_text(text) for text in texts]
        if None in rows and self.model.fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"The model was changed after the index was made: its fingerprint was "
                f"{self.fingerprint} and is {self.model.fingerprint}. Build the index again."
            )
        return embed_new(texts, rows, self._snapshot.vectors, self.model, **embedding)

    def _publish(self, chunks: ChunkSequence, vectors: StoredVectors) -> None:
        self._snapshot = self._view(chunks, vectors, self._snapshot.version + 1)

    def _view(
        self,
        chunks: ChunkSequence,
        vectors: StoredVectors,
        version: int,
        stored_ann: NDArray[np.uint8] | None = None,
    ) -> Snapshot:
        return Snapshot(chunks, vectors, version, ann_kind=self.ann, stored_ann=stored_ann)

    def __len__(self) -> int:
        return len(self._snapshot)

    def __repr__(self) -> str:
        return f"ChunkIndex({len(self)} chunks, dimension={self.model.dimension}, ann={self.ann!r})"

    def __copy__(self) -> ChunkIndex:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ChunkIndex:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        snapshot, saved = self._snapshot, self.saved
        if saved is not None and saved.holds(snapshot.version):
            return functools.partial(load_again, type(self), model=self.model), (saved,)
        make = functools.partial(
            type(self).from_embeddings, model=self.model, ann=self.ann, dtype=self.dtype
        )
        arguments = list(snapshot.chunks), snapshot.embeddings, self.fingerprint
        return functools.partial(make_again, make), arguments


def _embedder(model: QRAGModel | str | Path | None) -> QRAGModel:
    """A model as it is; one that is named, or none, as `resolve_model`."""
    if hasattr(model, "encode_actions"):
        return cast("QRAGModel", model)
    from qrag_retriever.model_choice import resolve_model  # loads torch

    return resolve_model(model)
