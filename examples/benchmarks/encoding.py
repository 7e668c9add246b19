"""Chunks embedded per second, beside `SentenceTransformer.encode` on the same texts.

    python examples/benchmarks/encoding.py --json examples/benchmarks/results/encoding.json

Two sets of texts from a book: sentences of similar length, and passages of mixed length of which a
third occurs twice. Both sides take turns, medians are compared, and the vectors must agree. With
``--openvino`` (``pip install openvino``) the same batches also go through the encoder as OpenVINO
compiles it, in float32, which shows whether a backend of that kind would be worth its dependency.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from machine import parse_run, report, take_turns

from qrag_retriever import ChunkIndex, QRAGModel
from qrag_retriever.model_files import load_embedder
from qrag_train.data import split_sentences

if TYPE_CHECKING:
    from collections.abc import Callable

BOOK = Path(__file__).parents[1] / "data" / "treasure_island.txt"
SENTENCES = (1, 1, 2, 4, 8)  # of a passage of mixed length


def main() -> None:
    options = parse()
    embedder = load_embedder(options.model, trust_remote_code=False)
    model = QRAGModel.from_encoder(options.model, device=str(embedder.device), scale=1.0)
    rows = [
        compare(name, texts, embedder, model, options)
        for name, texts in {"even": even, "mixed": mixed}.items()
        for texts in [texts(options.texts, options.seed)]
    ]
    if options.json:
        report(options.json, options.seed, repetitions=options.repetitions, figures=rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="an embedder; default: the offline one")
    parser.add_argument("--texts", type=int, default=1200)
    parser.add_argument("--openvino", action="store_true", help="for an embedder with mean pooling")
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
    name: str, texts: list[str], embedder: Any, model: QRAGModel, options: argparse.Namespace
) -> dict[str, Any]:
    """Time both, and see that they agree."""

    def build() -> ChunkIndex:
        return ChunkIndex.from_texts(texts, model=model, devices=options.devices)

    def plain() -> np.ndarray:
        vectors: np.ndarray = embedder.encode(texts, show_progress_bar=False)
        return vectors

    calls = {"index": build, "plain": plain}
    if options.openvino:
        compiled = with_openvino(model)
        calls["openvino"] = lambda: compiled(texts)
    expected = plain()
    apart = float(np.abs(build().snapshot().embeddings - expected).max())
    if options.openvino:
        apart = max(apart, float(np.abs(compiled(texts) - expected).max()))
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
    if options.openvino:
        row["openvino_per_s"] = round(len(texts) / seconds["openvino"], 1)
    print(*(f"{key}: {value}" for key, value in row.items()), sep="  ")
    return row


def with_openvino(model: QRAGModel) -> Callable[[list[str]], np.ndarray]:
    """The action encoder as OpenVINO compiles it: texts to embeddings, in the index's batches."""
    import openvino

    encoder = model.action_encoder

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer: Any = encoder.transformer.model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[:, :, None].to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))

    example = torch.ones(2, 8, dtype=torch.long)
    with torch.no_grad():
        converted = openvino.convert_model(Pooled(), example_input=(example, example))
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)

    def encode(texts: list[str]) -> np.ndarray:
        different = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        inputs = model.action_ids(list(different))
        vectors = np.empty((len(inputs), encoder.dimension), dtype=np.float32)
        for batch in encoder.batches(inputs):
            rows = [torch.tensor(inputs[row]) for row in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            vectors[batch] = compiled((ids.numpy(), mask.numpy()))[0]
        return vectors[[different[text] for text in texts]]

    return encode


if __name__ == "__main__":
    main()
