"""Fine-tune on 20 annotated questions over a small corpus, see the gain, use the model.

    python examples/finetune_on_your_corpus.py

It needs the extras ``train`` and, without a model hub, ``offline``.

The corpus is the handbook of an invented company: short notes such as "Team Otter builds and runs
search." and "Mateo Brandt leads the Otter team." A question takes two or three of them, and only
the first has a word in common with it. An annotation names the notes that answer a question:

    {"id": "1", "question": "Who is in charge of search?", "support": ["note-7", "note-31"]}

The 20 questions of train.jsonl are annotated so; the 20 of valid.jsonl, about other parts of the
company, tell what was learned. They also choose the best model, so for a figure to rely on keep
further questions aside. Training is the command that stands in `TRAIN`; the model it leaves is used
in LangChain and in LlamaIndex at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qrag_retriever import QRAGModel, QRAGRetriever, SearchOptions
from qrag_train.cli import main as qrag_train
from qrag_train.data import read_corpus_jsonl
from qrag_train.evaluation import evaluate

HANDBOOK = Path(__file__).parent / "data" / "handbook"
STEPS = 3
TRAIN = """fit
    --data.corpus {data}/corpus.jsonl
    --data.train_file {data}/train.jsonl
    --data.val_file {data}/valid.jsonl
    --model.max_steps {steps}
    --model.settings.max_chunk_tokens 48
    --trainer.max_steps {updates}
    --output_dir {folder}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/handbook"))
    arguments = parser.parse_args()
    questions = read_corpus_jsonl(HANDBOOK / "corpus.jsonl", HANDBOOK / "valid.jsonl")

    print("--- the embedder as it is, on questions it will not be trained on")
    show(QRAGModel.from_encoder(max_steps=STEPS), questions)

    command = TRAIN.format(
        data=HANDBOOK, steps=STEPS, updates=arguments.updates, folder=arguments.folder
    )
    print(f"\n--- qrag-train {command}")
    if qrag_train(command.split()):
        raise SystemExit(1)

    print("\n--- the trained model, on the same questions")
    model = QRAGModel.from_pretrained(arguments.folder / "model")
    show(model, questions)

    notes = list(questions[0].chunks)
    retriever = QRAGRetriever.from_texts(notes, model=model, k=STEPS)
    question = questions[0].question
    print(f"\n--- in LangChain: {question}")
    for document in retriever.invoke(question):
        print(f"{type(document).__name__}: {document.page_content}")
    print("\n--- in LlamaIndex")
    for node in retriever.retrieve(question):
        print(f"{type(node).__name__}: {node.score:.2f} {node.text}")


def show(model: QRAGModel, questions: list) -> None:
    """All support found (Fact-EM), and the part of it that was, in several steps and in one."""
    for name, per_step in (("in steps", 1), ("all at once", STEPS)):
        scores = evaluate(model, questions, SearchOptions(STEPS, chunks_per_step=per_step))
        print(
            f"{STEPS} notes {name}: Fact-EM {scores['fact_em']:.2f}, "
            f"recall {scores['fact_recall']:.2f}"
        )


if __name__ == "__main__":
    main()
