"""Chunks embedded per second, beside `SentenceTransformer.encode` on the same texts.

    python examples/benchmarks/encoding.py --json examples/benchmarks/results/encoding.json

Two sets of texts from a book: sentences of similar length, and passages of mixed length of which a
third occurs twice. Both sides take turns, medians are compared, and the vectors must agree. With
``--openvino`` (extra ``openvino``) an index is also built by that backend, and single states go
through both, as they do in the steps of a query.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from machine import parse_run, report, take_turns

from qrag_retriever import ChunkIndex, QRAGModel
from qrag_retriever.pretrained import load_embedder
from qrag_train.data import split_sentences

BOOK = Path(__file__).parents[1] / "data" / "treasure_island.txt"
SENTENCES = (1, 1, 2, 4, 8)  # of a passage of mixed length
STATES = (0, 1, 3)  # chunks in a state whose time is taken


def main() -> None:
    options = parse()
    embedder = load_embedder(options.model, trust_remote_code=False)
    model = QRAGModel.from_encoder(options.model, device=str(embedder.device), scale=1.0)
    compiled = None  # by OpenVINO
    if options.openvino:
        compiled = QRAGModel.from_encoder(options.model, backend="openvino", scale=1.0)
    rows = [
        compare(name, texts, embedder, model, compiled, options)
        for name, texts in {"even": even, "mixed": mixed}.items()
        for texts in [texts(options.texts, options.seed)]
    ]
    more = {}
    if compiled is not None:
        more["one_state"] = one_state(model, compiled, options.repetitions)
    if options.json:
        report(options.json, options.seed, repetitions=options.repetitions, figures=rows, **more)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="an embedder; default: the offline one")
    parser.add_argument("--texts", type=int, default=1200)
    parser.add_argument("--openvino", action="store_true", help="measure that backend as well")
    parser.add_argument("--devices", nargs="+", help="of the index; default: the model's alone")
    return parse_run(parser, repetitions=5)


def even(count: int, seed: int) -> list[str]:
    """Different sentences of 8 to 14 words."""
    sentences = split_sentences(BOOK.read_text(encoding="utf-8"))
    chosen = list(dict.fromkeys(text for text in sentences if 8 <= len(text.split()) <= 14))
    return np.random.default_rng(seed).permutation(chosen)[:count].tolist()


def mixed(count: int, seed: int) -> list[str]:
    """One to eight sentences each, a third of the texts repeated."""
    sentences = split_sentences(BOOK.read_text(encoding="utf-8"))
    random = np.random.default_rng(seed)
    texts = []
    for _ in range(count - count // 3):
        first = int(random.integers(len(sentences) - max(SENTENCES)))
        texts.append(" ".join(sentences[first : first + int(random.choice(SENTENCES))]))
    texts += random.choice(texts, count // 3, replace=False).tolist()
    return random.permutation(texts).tolist()


def compare(
    name: str,
    texts: list[str],
    embedder: Any,
    model: QRAGModel,
    compiled: QRAGModel | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Time both, and see that they agree."""

    def build(by: QRAGModel = model) -> ChunkIndex:
        return ChunkIndex.from_texts(texts, model=by, devices=options.devices)

    def plain() -> np.ndarray:
        vectors: np.ndarray = embedder.encode(texts, show_progress_bar=False)
        return vectors

    calls = {"index": build, "plain": plain}
    if compiled is not None:
        calls["openvino"] = lambda: build(compiled)
    expected = plain()
    built = [call() for name, call in calls.items() if name != "plain"]
    apart = max(float(np.abs(index.snapshot().embeddings - expected).max()) for index in built)
    if apart > 1e-3:
        raise SystemExit(f"{name}: the embeddings differ by {apart:.2g}")
    seconds = take_turns(calls, options.repetitions)
    row = {
        "texts": name,
        "count": len(texts),
        "different": len(set(texts)),
        "devices": options.devices or [str(model.device)],
        "sentence_transformer_per_s": round(len(texts) / seconds["plain"], 1),
        "chunk_index_per_s": round(len(texts) / seconds["index"], 1),
        "times_faster": round(seconds["plain"] / seconds["index"], 2),
        "largest_difference": apart,
    }
    if compiled is not None:
        row["openvino_per_s"] = round(len(texts) / seconds["openvino"], 1)
        row["openvino_times_faster"] = round(seconds["index"] / seconds["openvino"], 2)
    print(*(f"{key}: {value}" for key, value in row.items()), sep="  ")
    return row


def one_state(plain: QRAGModel, compiled: QRAGModel, repetitions: int) -> list[dict[str, Any]]:
    """Milliseconds for one state, which is what a step of a query waits for."""
    sentences = split_sentences(BOOK.read_text(encoding="utf-8"))
    rows = []
    for chunks in STATES:
        states = [("Where was the treasure?", sentences[100 : 100 + chunks])]
        seconds = take_turns(
            {
                "torch": lambda states=states: plain.encode_states(states),
                "openvino": lambda states=states: compiled.encode_states(states),
            },
            4 * repetitions,
        )
        rows.append(
            {
                "chunks_in_state": chunks,
                "tokens": len(plain.state_ids(states)[0]),
                "torch_ms": round(1000 * seconds["torch"], 1),
                "openvino_ms": round(1000 * seconds["openvino"], 1),
                "times_faster": round(seconds["torch"] / seconds["openvino"], 2),
            }
        )
        print(*(f"{key}: {value}" for key, value in rows[-1].items()), sep="  ")
    return rows


if __name__ == "__main__":
    main()
