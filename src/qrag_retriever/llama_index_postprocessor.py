"""Multi-step selection as a LlamaIndex node postprocessor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from pydantic import Field, PrivateAttr

from qrag_retriever.collector import in_thread
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.model import QRAGModel
from qrag_retriever.model_choice import name_of
from qrag_retriever.second_stage import Selector


class QRAGNodePostprocessor(BaseNodePostprocessor):
    """Selects nodes in several steps, for the ``node_postprocessors`` of a query engine.

    What it returns are the very nodes given, scored with their Q. The asynchronous method runs in a
    thread.

    Args:
        model: A `QRAGModel` with ``positions="none"``, or folder or hub name of one, or of any
            embedder to use untrained; ``None``: multihop-en.
        **settings: ``k``, the number of nodes to select, by default what the model was trained for;
            ``q_threshold``: stop at the first step whose best Q lies below it, by default the
            model's.

    Raises:
        ConfigError: If the model needs to know the order of the document.
        InvalidInputError: If a setting is unknown or out of range; in a call, if there is no query.
        ModelFormatError: If the model cannot be loaded.

    Attributes:
        model_name: Folder or name of the model, where that was given.
        k: Number of nodes to select.
        q_threshold: Least Q, or ``None``.
    """

    # what LlamaIndex dumps, and makes a postprocessor of again
    model_name: str = Field(default="", frozen=True)
    k: int = Field(default=0, frozen=True)
    q_threshold: float | None = Field(default=None, frozen=True)
    _selector: Selector = PrivateAttr()

    def __init__(self, model: QRAGModel | str | Path | None = None, **settings: Any) -> None:
        name = settings.pop("model_name", None)
        model = name if model is None else model
        fields = {name: settings.pop(name) for name in ("callback_manager",) if name in settings}
        selector = Selector(model, **settings)
        fields |= {name: getattr(selector.options, name) for name in ("k", "q_threshold")}
        super().__init__(**{**fields, "model_name": name_of(model)})
        self._selector = selector

    def __reduce__(self) -> tuple[Any, ...]:
        # LlamaIndex's own way calls __init__ with what it dumps, which has no model
        settings = {"k": self.k, "q_threshold": self.q_threshold}
        return functools.partial(type(self), self._selector.model, **settings), ()

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex knows the class."""
        return "QRAGNodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InvalidInputError("Nodes are selected for a query; give query_str or a bundle.")
        selected = self._selector.select(query_bundle.query_str, nodes)
        return [NodeWithScore(node=step.chunk.source, score=step.q_value) for step in selected]

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return await in_thread(self._postprocess_nodes, nodes, query_bundle)
