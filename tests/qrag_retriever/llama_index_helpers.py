"""What the tests of the LlamaIndex retriever share: nodes, an index of them, recorders."""

from __future__ import annotations

import contextlib

from corpus import IDS, METADATAS, TEXTS, shared_model
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from pydantic import PrivateAttr

from qrag_retriever.index import ChunkIndex

MODEL = shared_model("relative")
NODES = [
    TextNode(
        id_=id_,
        text=text,
        metadata=metadata,
        excluded_embed_metadata_keys=["number"],
        excluded_llm_metadata_keys=["tenant"],
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")},
    )
    for id_, text, metadata in zip(IDS, TEXTS, METADATAS, strict=True)
]
INDEX = ChunkIndex.from_documents(NODES, model=MODEL)


def contents(nodes):
    return [(node.node, node.score) for node in nodes]


def ids(nodes):
    return [node.node.node_id for node in nodes]


class _Events(BaseEventHandler):
    _seen: list = PrivateAttr(default_factory=list)

    def handle(self, event, **kwargs):
        self._seen.append(event)


@contextlib.contextmanager
def instrumented():
    """Events and names of spans that LlamaIndex's instrumentation sees in the block."""
    root = get_dispatcher()
    events, spans = _Events(), SimpleSpanHandler()
    names: list[str] = []
    root.add_event_handler(events)
    root.add_span_handler(spans)
    try:
        yield events._seen, names
    finally:
        root.event_handlers.remove(events)
        root.span_handlers.remove(spans)
        assert not spans.open_spans
        names += [span.id_.rsplit("-", 5)[0] for span in spans.completed_spans]
