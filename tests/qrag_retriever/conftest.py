"""Tiny embedders with random weights, built in seconds, so that no test downloads anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    XLMRobertaConfig,
)

from qrag_retriever.model import QRAGModel

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (
    "the a of in to and who where what is was did man woman dog cat river house green red sandra "
    "mary john daniel kitchen garden office bathroom hallway apple milk football went moved "
    "travelled journeyed picked took dropped left got down up there back city born capital france "
    "paris london film director wrote song band query passage"
)
WORDS = TEXT.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SIGNS = ".,:;?!'\"()[]-_/<>|#"

# initializer_range: random weights large enough to tell texts apart
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}


def save_embedder(
    folder: Path, config: Any, tokenizer: Tokenizer, specials: dict[str, str], seed: int
) -> Path:
    """A Transformers folder: random weights and a tokenizer."""
    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    window = config.max_position_embeddings
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=window, **specials)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Transformers folder: BERT, WordPiece, a window of 64 tokens."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *SIGNS]
    names += [f"##{letter}" for letter in LETTERS]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **SHAPE)
    return save_embedder(tmp_path_factory.mktemp("bert"), config, tokenizer, specials, seed=1)


@pytest.fixture(scope="session")
def tiny_sentence_encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Sentence-Transformers folder: normalised, with prompts, 32 tokens a text."""
    transformer = Transformer(str(tiny_encoder), max_seq_length=32)
    folder = tmp_path_factory.mktemp("sentence")
    SentenceTransformer(
        modules=[transformer, Pooling(32, pooling_mode="mean"), Normalize()],
        prompts={"query": "query: ", "document": "passage: "},
        device="cpu",
    ).save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def tiny_xlm_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformers folder like multilingual E5: XLM-R, Unigram, positions that start at 2."""
    specials = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    pieces = [(piece, 0.0) for piece in specials.values()]
    pieces += [("▁" + word, -4.0) for word in WORDS]
    pieces += [(sign, -8.0) for sign in ["▁", *LETTERS, *SIGNS]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    named = {f"{name}_token": text for name, text in specials.items()}
    named |= {"cls_token": "<s>", "sep_token": "</s>"}
    config = XLMRobertaConfig(
        vocab_size=len(pieces),
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **SHAPE,
    )
    return save_embedder(tmp_path_factory.mktemp("xlmr"), config, tokenizer, named, seed=2)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformers folder like Qwen3-Embedding: a decoder, byte-level BPE, a token at the end."""
    end, stop = "<|endoftext|>", "<|im_end|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*letters, end, stop])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
    )
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        max_position_embeddings=512,
        num_key_value_heads=2,
        head_dim=8,
        **SHAPE,
    )
    specials = {"pad_token": end, "eos_token": stop}
    return save_embedder(tmp_path_factory.mktemp("qwen3"), config, tokenizer, specials, seed=3)


@pytest.fixture(scope="session")
def tiny_model(tiny_encoder: Path) -> QRAGModel:
    """An untrained model with relative positions, shared: do not train or change it."""
    return QRAGModel.from_encoder(tiny_encoder, "relative", device="cpu")
