"""Ask a book that lies in a vector database: here Qdrant, in a local folder.

    python examples/vector_store.py
    python examples/vector_store.py --question "How did the blind man die?" --steps 3

The first run fills the collection the usual way; later runs find it there. It needs the extra
``qdrant``, and no model hub where ``offline`` is installed.
"""

from __future__ import annotations

from pathlib import Path

from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient, models

import book
from qrag_retriever import QRAGEmbeddings
from qrag_retriever.langchain import QRAGRetriever


def main() -> None:
    parser = book.parser(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="retrieval budget k")
    parser.add_argument(
        "--model", default=book.MODEL, help="a Q-RAG model or any embedder: folder or hub name"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/qdrant"))
    arguments = parser.parse_args()

    embeddings = QRAGEmbeddings(arguments.model)
    chunks = book.read_chunks(arguments.book)
    client = QdrantClient(path=str(arguments.folder))
    store = open_store(embeddings, client, book.name_of(arguments.book), chunks)

    print("--- in several steps, each one request to the database")
    retriever = QRAGRetriever.from_vector_store(
        store, model=embeddings.model, number_key="number", k=arguments.steps
    )
    print(retriever.search(arguments.question))

    print("\n--- in the first half of the book alone: the database's own filters")
    half = models.FieldCondition(key="metadata.number", range=models.Range(lt=len(chunks) // 2))
    print(retriever.search(arguments.question, filter=models.Filter(must=[half])))

    print("\n--- as a second stage over a retriever that is there already")
    second = QRAGRetriever.from_retriever(
        store.as_retriever(), model=embeddings.model, candidates=100, k=arguments.steps
    )
    for document in second.invoke(arguments.question):
        print(f"{document.metadata['number']:>4}  {document.page_content[:80]} …")


def open_store(
    embeddings: QRAGEmbeddings, client: QdrantClient, name: str, chunks: list[str]
) -> QdrantVectorStore:
    """The collection, filled when it is not whole: Q is an inner product, so its metric is DOT."""
    filled = client.collection_exists(name) and client.count(name).count == len(chunks)
    if not filled:
        client.delete_collection(name)
        size = embeddings.model.dimension
        vectors = models.VectorParams(size=size, distance=models.Distance.DOT)
        client.create_collection(name, vectors)
    store = QdrantVectorStore(client, name, embeddings, distance=models.Distance.DOT)
    if not filled:
        store.add_texts(chunks, [{"number": number} for number in range(len(chunks))])
    return store


if __name__ == "__main__":
    main()
