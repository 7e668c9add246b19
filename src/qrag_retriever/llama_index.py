"""The retriever as a LlamaIndex retriever."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_index.core.instrumentation as instrument
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.schema import BaseNode, IndexNode, NodeWithScore, QueryBundle
from typing_extensions import Self

from qrag_retriever.adapter import (
    NEEDS,
    SEARCH_SETTINGS,
    RetrieverAdapter,
    fill_in,
    step_data,
)
from qrag_retriever.collector import in_thread
from qrag_retriever.constructors import ALIASES, resolve_aliases
from qrag_retriever.corpus import Corpus
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.model import QRAGModel
from qrag_retriever.model_choice import resolve_model
from qrag_retriever.nodes import node_from_chunk
from qrag_retriever.search import SearchOptions

if TYPE_CHECKING:
    from qrag_retriever.trajectory import Step

_DEFAULTS = {
    "index": None,
    "model": None,
    "k": None,
    **{
        field.name: field.default
        for field in dataclasses.fields(SearchOptions)
        if field.name in SEARCH_SETTINGS and field.name != "k"
    },
    "filter": None,
}

_dispatcher = instrument.get_dispatcher(__name__)  # type: ignore[attr-defined]


class QRAGStepEvent(BaseEvent):
    """A step of a multi-step retrieval.

    Attributes:
        query: The query.
        step: Number of the step, from 1.
        chunk_id: Id of the chunk retrieved.
        index: Its number in the index.
        q_value: Q of taking it.
        position: ρ at that step.
    """

    query: str
    step: int
    chunk_id: str
    index: int
    q_value: float
    position: float

    @classmethod
    def class_name(cls) -> str:
        """Name under which handlers see the event."""
        return "QRAGStepEvent"


def _query_of(bundle: QueryBundle) -> str:
    """What is searched for: the question, or the texts that a transform such as HyDE wants read."""
    return "\n".join(bundle.custom_embedding_strs or [bundle.query_str])


class LlamaIndexHooks(BaseRetriever, RetrieverAdapter):
    """What LlamaIndex calls: ``retrieve``, ``aretrieve`` and its constructors."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        query = _query_of(query_bundle)

        def report(_: int, step: Step) -> None:
            _dispatcher.event(QRAGStepEvent(query=query, **step_data(step)))

        [trajectory] = self.search_batch([query], on_step=report)
        return [
            NodeWithScore(node=node_from_chunk(step.chunk), score=step.q_value)
            for step in trajectory
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        ready = await self._prepared([_query_of(query_bundle)])
        return await in_thread(ready._retrieve, query_bundle)  # noqa: SLF001

    @classmethod
    def from_defaults(
        cls,
        index: Any = None,
        nodes: Sequence[BaseNode] | None = None,
        docstore: Any = None,
        *,
        model: QRAGModel | str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """A retriever over a `ChunkIndex`, or over the nodes of a LlamaIndex index or docstore.

        Args:
            index: A `ChunkIndex`, or a LlamaIndex index that keeps its nodes in a docstore.
            nodes: Nodes, in document order.
            docstore: A LlamaIndex docstore.
            model: See `from_texts`; ``embed_model`` is the same.
            **settings: Settings of the retriever, such as ``similarity_top_k``.

        Raises:
            InvalidInputError: If not exactly one of ``index``, ``nodes`` and ``docstore`` is given,
                or it holds no nodes.
        """
        given = [source for source in (index, nodes, docstore) if source is not None]
        if len(given) != 1:
            raise InvalidInputError(
                f"Give exactly one of index, nodes and docstore; {len(given)} were given."
            )
        if isinstance(index, ChunkIndex):
            settings = resolve_aliases({"model": model, **settings})
            if settings["model"] is not None:
                settings["model"] = resolve_model(settings["model"])
            return cls(index=index, **settings)  # type: ignore[call-arg]
        if nodes is None:
            store = docstore if index is None else getattr(index, "docstore", None)
            docs = getattr(store, "docs", None)
            if docs is None:
                raise InvalidInputError(
                    f"A {type(given[0]).__name__} holds no nodes; index is a ChunkIndex or a "
                    "LlamaIndex index, docstore a LlamaIndex docstore."
                )
            nodes = list(docs.values() if index is None else _held(index, docs))
        if not nodes:
            raise InvalidInputError(
                "There are no nodes: an index over an outer vector store keeps none in its "
                "docstore. Give nodes= instead."
            )
        return cls.from_documents(nodes, model=model, **settings)

    def add_nodes(self, nodes: Sequence[BaseNode]) -> list[str]:
        """Add nodes; as `add_documents`."""
        return self.add_documents(nodes)

    def persist(self, persist_dir: str | Path) -> None:
        """Write index, settings and model to a folder; the same as `save_local`."""
        self.save_local(persist_dir)

    @classmethod
    def from_persist_dir(cls, persist_dir: str | Path, **settings: Any) -> Self:
        """Load what `persist` wrote; the same as `load_local`."""
        return cls.load_local(persist_dir, **settings)


class QRAGRetriever(LlamaIndexHooks):
    """Multi-step retrieval as a LlamaIndex retriever.

    Each step is reported to LlamaIndex's instrumentation as a `QRAGStepEvent`.

    Args:
        index: A `ChunkIndex`, or what `from_vector_store` or `from_retriever` make.
        model: Encoders; by default those the index was made with.
        similarity_top_k: Number of chunks to retrieve, also known as ``k``; by default what the
            model was trained for.
        q_threshold: Stop at the first step whose best Q lies below it; by default the model's.
        beams: Trajectories followed at once; 1: greedy.
        temperature: Draw chunks from softmax(Q / temperature) instead of taking the best.
        seed: Seed of those draws.
        chunks_per_step: Chunks taken from one state.
        filters: Which chunks are candidates: ``MetadataFilters``, metadata mapping or a callable on
            `Chunk`; over a vector store what that understands. Also known as ``filter``.
        callback_manager: LlamaIndex's callback manager.
        object_map: Objects that index nodes stand for, by id.
        objects: Index nodes with their objects, instead of ``object_map``.
        verbose: Print when retrieval enters an object.

    Raises:
        InvalidInputError: If a setting is unknown or out of range.
        FingerprintMismatchError: If the index was made by another model.
    """

    def __init__(
        self,
        index: Corpus,
        model: QRAGModel | None = None,
        *,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(callback_manager, object_map, objects, verbose)
        given = fill_in({"index": index, "model": model, **settings})
        for name, default in _DEFAULTS.items():
            setattr(self, name, given.pop(name, default))
        if given:
            raise InvalidInputError(
                f"Unknown setting {', '.join(map(repr, sorted(given)))}; known: "
                f"{', '.join([*_DEFAULTS, *ALIASES])}."
            )
        if not isinstance(self.index, Corpus) or not isinstance(self.model, QRAGModel):
            raise InvalidInputError(NEEDS)
        self._check_settings()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> QRAGRetriever:
        """A retriever of its own over the same index and model."""
        return copy.copy(self)


def _held(index: Any, docs: Mapping[str, BaseNode]) -> Iterator[BaseNode]:
    """The nodes of a LlamaIndex index, in the docstore's order.

    A docstore may serve other indexes too, holds the parents of nodes, and keeps what is deleted
    from the index.
    """
    structure = getattr(index, "index_struct", None)
    for name in ("nodes_dict", "nodes", "node_ids"):
        if hasattr(structure, name):
            ids = getattr(structure, name)
            held = set(ids.values() if isinstance(ids, Mapping) else ids)
            # deleting nodes from LlamaIndex's own vector store leaves them in the structure
            data = getattr(getattr(index, "vector_store", None), "data", None)
            if data is not None and hasattr(data, "embedding_dict"):
                held.intersection_update(data.embedding_dict)
            return (node for id_, node in docs.items() if id_ in held)
    raise InvalidInputError(
        f"Which nodes a {type(index).__name__} holds is not known; give nodes= or docstore=."
    )
