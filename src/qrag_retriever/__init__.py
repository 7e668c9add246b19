"""Multi-step retrieval for LangChain and LlamaIndex with Q-RAG (arXiv 2511.07328).

Importing this package imports neither framework nor torch; its names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrag_retriever.chunk import Chunk
    from qrag_retriever.config import QRAGConfig
    from qrag_retriever.engine import MultiStepRetriever
    from qrag_retriever.errors import QRAGError
    from qrag_retriever.index import ChunkIndex
    from qrag_retriever.langchain_compressor import QRAGDocumentCompressor
    from qrag_retriever.langchain_embeddings import QRAGEmbeddings
    from qrag_retriever.llama_index_embedding import QRAGEmbedding
    from qrag_retriever.llama_index_postprocessor import QRAGNodePostprocessor
    from qrag_retriever.model import QRAGModel
    from qrag_retriever.retriever import QRAGRetriever
    from qrag_retriever.search import SearchOptions
    from qrag_retriever.trajectory import Step, Trajectory

__version__ = "0.1.0"

__all__ = [
    "Chunk",
    "ChunkIndex",
    "MultiStepRetriever",
    "QRAGConfig",
    "QRAGDocumentCompressor",
    "QRAGEmbedding",
    "QRAGEmbeddings",
    "QRAGError",
    "QRAGModel",
    "QRAGNodePostprocessor",
    "QRAGRetriever",
    "SearchOptions",
    "Step",
    "Trajectory",
    "__version__",
]

_HOME = {
    "Chunk": "chunk",
    "ChunkIndex": "index",
    "MultiStepRetriever": "engine",
    "QRAGConfig": "config",
    "QRAGDocumentCompressor": "langchain_compressor",
    "QRAGEmbedding": "llama_index_embedding",
    "QRAGEmbeddings": "langchain_embeddings",
    "QRAGError": "errors",
    "QRAGModel": "model",
    "QRAGNodePostprocessor": "llama_index_postprocessor",
    "QRAGRetriever": "retriever",
    "SearchOptions": "search",
    "Step": "trajectory",
    "Trajectory": "trajectory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
