"""A tiny model and a small corpus: real encoders with random weights, made without a download."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from qrag_retriever.index import ChunkIndex
from qrag_retriever.model import QRAGModel

torch.set_num_threads(1)  # tensors as small as these leave threads nothing but waiting

TEXTS = [
    "Mary went to the garden.",
    "John took the apple.",
    "Sandra moved to the office.",
    "Daniel dropped the milk there.",
    "Mary picked up the football.",
    "John went back to the kitchen.",
    "Sandra left the apple in the hallway.",
    "Daniel travelled to the bedroom.",
    "Mary put down the football.",
]
IDS = [f"fact-{number}" for number in range(len(TEXTS))]
METADATAS = [{"tenant": "ab"[number % 2], "number": number} for number in range(len(TEXTS))]
QUERY = "Where is the football?"
QUERIES = [QUERY, "Who took the apple?", "Where did Sandra go?"]

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache
def encoder_folder() -> str:
    """Folder of an embedder with random weights; it lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-encoder-")
    _KEPT.append(folder)
    words = sorted({word for text in [*TEXTS, *QUERIES] for word in _words(text)})
    pieces = [chr(code) for code in range(33, 127)]
    vocabulary = dict.fromkeys([*_SPECIAL, *words, *pieces, *(f"##{piece}" for piece in pieces)])
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder.name)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(numbers),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        initializer_range=0.6,
    )
    BertModel(config).save_pretrained(folder.name)
    return folder.name


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def make_model(positions: str = "none", **config: Any) -> QRAGModel:
    """A new tiny model, d = 16; equal settings give equal weights."""
    settings = {"scale": 0.5, "max_steps": 3, **config}
    model = QRAGModel.from_encoder(encoder_folder(), positions, device="cpu", **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # so that it matters which of the two encoders is asked
        for weights in model.state_encoder.parameters():
            weights.add_(torch.randn(weights.shape, generator=generator), alpha=0.3)
    return model


@functools.cache
def shared_model(positions: str = "none") -> QRAGModel:
    """One tiny model for all tests that do not change it."""
    return make_model(positions)


def make_index(model: QRAGModel | None = None, **settings: Any) -> ChunkIndex:
    """A new index of the corpus."""
    return ChunkIndex.from_texts(TEXTS, METADATAS, IDS, model=model or shared_model(), **settings)


def model_copy_in(folder: Path, positions: str = "none") -> str:
    """The shared model saved in a folder, as a path string."""
    return str(shared_model(positions).save_pretrained(folder / "model"))


def _words(text: str) -> list[str]:
    return text.lower().replace(".", " ").replace("?", " ").split()
