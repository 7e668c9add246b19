"""A new, untrained encoder with a vocabulary of its own, for synthetic tasks and fast tests."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from qrag_retriever.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_UNKNOWN = "[UNK]"
_SPECIAL = ["[PAD]", _UNKNOWN, "[CLS]", "[SEP]", "[MASK]"]
_MOST_TEXTS = 50_000
_NORMALIZER = normalizers.BertNormalizer(lowercase=True)
_WORDS = pre_tokenizers.BertPreTokenizer()


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """Size of a new encoder (a BERT with mean pooling).

    Attributes:
        layers: Number of layers.
        dimension: Length d of an embedding, a multiple of ``heads`` and of 4.
        heads: Attention heads.
        vocabulary: Most entries of the WordPiece vocabulary.
        max_tokens: Window.

    Raises:
        ConfigError: If a value is out of range.
    """

    layers: int = 2
    dimension: int = 128
    heads: int = 4
    vocabulary: int = 4000
    max_tokens: int = 256

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("heads", 1), ("vocabulary", 100), ("max_tokens", 16)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not allowed; give at least {least}."
                )
        if self.dimension < 4 or self.dimension % 4 or self.dimension % self.heads:
            raise ConfigError(
                f"dimension={self.dimension!r} is not allowed; give a multiple of 4 and of "
                f"heads={self.heads}."
            )


def make_encoder(
    folder: str | Path, texts: Iterable[str], config: ScratchConfig, seed: int = 0
) -> Path:
    """Write a new encoder with random weights to a folder, to be named as any other embedder.

    Args:
        folder: Where to.
        texts: Texts the vocabulary is taken from; the first 50,000 count.
        config: Its size.
        seed: Seed of the weights.

    Returns:
        The folder, for `QRAGModel.from_encoder`.
    """
    tokenizer = _train_tokenizer(itertools.islice(texts, _MOST_TEXTS), config)
    settings = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.dimension,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.dimension,
        max_position_embeddings=config.max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _train_tokenizer(texts: Iterable[str], config: ScratchConfig) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(_vocabulary(list(texts), config), unk_token=_UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _NORMALIZER, _WORDS
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", start), ("[SEP]", end)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in _SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=config.max_tokens, **names
    )


def _vocabulary(texts: Sequence[str], config: ScratchConfig) -> dict[str, int]:
    """A WordPiece vocabulary that depends on the texts alone.

    The trainer numbers the pieces inside words as it comes across them, in an order that changes
    from run to run, and breaks ties by number: so they are all given to it in a fixed order.
    """
    letters = sorted({letter for text in texts for letter in _NORMALIZER.normalize_str(text)})
    pieces = [f"##{letter}" for letter in letters if not letter.isspace()]
    tokenizer = Tokenizer(models.WordPiece(unk_token=_UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _NORMALIZER, _WORDS
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(config.vocabulary, len(_SPECIAL) + 2 * len(pieces)),
        special_tokens=[*_SPECIAL, *pieces],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return dict(tokenizer.get_vocab())
