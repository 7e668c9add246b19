"""A LlamaIndex query engine that answers a question from a book.

    python examples/llama_index_rag.py
    python examples/llama_index_rag.py --llm llama3.1 --base-url http://localhost:11434/v1

Without ``--llm`` LlamaIndex's mock model takes the model's place and repeats what it was given. A
real one needs ``pip install llama-index-llms-openai-like``; it may be any server that speaks
OpenAI's protocol.
"""

from __future__ import annotations

import os

import llama_index.core.instrumentation as instrument
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode

import book
from qrag_retriever.llama_index import QRAGRetriever, QRAGStepEvent


class PrintSteps(BaseEventHandler):
    """Prints each retrieval step while it happens."""

    def handle(self, event: BaseEvent, **_: object) -> None:
        if isinstance(event, QRAGStepEvent):
            print(f"step {event.step}: chunk {event.index}, Q = {event.q_value:.3f}")


def main() -> None:
    parser = book.parser(__doc__)
    parser.add_argument("--llm", help="name of a chat model; left out: a mock model")
    parser.add_argument("--base-url", default="https://api.openai.com/v1")
    arguments = parser.parse_args()

    instrument.get_dispatcher().add_event_handler(PrintSteps())
    nodes = [
        TextNode(
            text=text, metadata={"book": arguments.book.stem}, excluded_embed_metadata_keys=["book"]
        )
        for text in book.read_chunks(arguments.book)
    ]
    retriever = QRAGRetriever.from_defaults(
        nodes=nodes, model=book.MODEL, similarity_top_k=4, show_progress=True
    )
    llm = language_model(arguments.llm, arguments.base_url)
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
    response = engine.query(arguments.question)
    print(response)
    print("Sources:", [f"{node.score:.3f} {node.node_id}" for node in response.source_nodes])


def language_model(name: str | None, base_url: str) -> LLM:
    if name is None:
        return MockLLM()
    try:
        from llama_index.llms.openai_like import OpenAILike
    except ImportError:
        raise SystemExit("A real model needs: pip install llama-index-llms-openai-like") from None
    return OpenAILike(
        model=name,
        api_base=base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        is_chat_model=True,
    )


if __name__ == "__main__":
    main()
