"""Ask a whole book a question whose answer lies in two places of it.

    python examples/quickstart.py
    python examples/quickstart.py --book my_book.txt --question "Who …?"
    python examples/quickstart.py --question "How did the blind man die?" --steps 3 --plot steps.png

The first run embeds the book and saves the index; later runs map it from disk. No model hub is
needed where the extra ``offline`` is installed.
"""

from __future__ import annotations

from pathlib import Path

import book
from qrag_retriever import QRAGRetriever


def main() -> None:
    parser = book.parser(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="k, the most chunks to retrieve")
    parser.add_argument(
        "--model", default=book.MODEL, help="a Q-RAG model or any embedder: folder or hub name"
    )
    parser.add_argument("--folder", type=Path, help="of the index; default: one for each book")
    parser.add_argument("--plot", type=Path, help="draw Q over the book to this file")
    arguments = parser.parse_args()

    folder = arguments.folder or Path(
        "runs", book.name_of(arguments.book), Path(arguments.model).name
    )
    if folder.exists():
        retriever = QRAGRetriever.load_local(folder, model=arguments.model)
    else:
        retriever = QRAGRetriever.from_texts(
            book.read_chunks(arguments.book), model=arguments.model, show_progress=True
        )
        retriever.save_local(folder)
    retriever.k = arguments.steps

    print("\n--- in several steps: what was found tells what to look for next")
    trajectory = retriever.search(arguments.question)
    print(trajectory)

    print("\n--- in one step, as ordinary retrievers do")
    print(retriever.search(arguments.question, chunks_per_step=arguments.steps))

    print("\n--- the same object as a LangChain retriever: invoke() gives Documents")
    for document in retriever.invoke(arguments.question):
        print(f"{type(document).__name__}: {document.page_content[:80]} …")

    print("\n--- and as a LlamaIndex retriever: retrieve() gives nodes with their Q")
    for node in retriever.retrieve(arguments.question):
        print(f"{type(node).__name__}: {node.score:.3f} {node.text[:70]} …")

    if arguments.plot:
        trajectory.plot().savefig(arguments.plot, dpi=120)
        print(f"\nDrew {arguments.plot}")


if __name__ == "__main__":
    main()
