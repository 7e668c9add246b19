"""Embed a corpus with Ray Data on several workers, and search what they made.

    pip install 'qrag-retriever[offline,ray]'
    python examples/bulk_embedding.py --workers 2

The embeddings are kept as Parquet files: embedding is done once, however often the index is built.
A worker that dies is started again and its batch given out anew. On a cluster the same script runs
by ``ray job submit``; to write straight into a vector store see ``qrag_retriever.bulk.fill_store``.
"""

from __future__ import annotations

from pathlib import Path

try:
    import ray.data
except ImportError:
    raise SystemExit("This example needs Ray: pip install 'qrag-retriever[ray]'") from None

import book
from qrag_retriever import QRAGModel, QRAGRetriever
from qrag_retriever.bulk import embed_dataset, index_of


def main() -> None:
    parser = book.parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker")
    parser.add_argument("--chunks", type=int, help="take the first so many chunks alone")
    parser.add_argument("--folder", type=Path, help="default: one for each book")
    arguments = parser.parse_args()

    folder = (
        arguments.folder
        or Path("runs/bulk", book.name_of(arguments.book), str(arguments.chunks or "all"))
    ).resolve()
    model, embedded = folder / "model", folder / "embedded"
    if not model.exists():
        QRAGModel.from_encoder(device="cpu").save_pretrained(model)
    if not embedded.exists():
        chunks = book.read_chunks(arguments.book)[: arguments.chunks]
        rows = [{"number": number, "text": text} for number, text in enumerate(chunks)]
        dataset = ray.data.from_items(rows).repartition(4 * arguments.workers)
        embed_dataset(
            dataset, model, workers=arguments.workers, gpus=arguments.gpus, batch_size=64
        ).write_parquet(str(embedded))

    dataset = ray.data.read_parquet(str(embedded))
    index = index_of(dataset, QRAGModel.from_pretrained(model), order_by="number")
    print(f"{len(index)} chunks embedded by {arguments.workers} workers")
    print(QRAGRetriever(index=index).search(arguments.question, k=4))


if __name__ == "__main__":
    main()
