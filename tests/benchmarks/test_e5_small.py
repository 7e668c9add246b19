from __future__ import annotations

import struct
from pathlib import Path

import e5_small
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from qrag_retriever.errors import ModelFormatError

WIDTH, INNER, LAYERS, PLACES = 32, 64, 1, 16
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁cat", "▁s", "at", "▁", "ж", "語", "▁1994"]
PIECES += list("thecas")


def written(random: np.random.Generator) -> tuple[bytes, dict[str, np.ndarray]]:
    """A file of the format, and the weights that it holds."""
    tensors: list[tuple[str, bytes]] = []
    expected: dict[str, np.ndarray] = {}

    def plain(name: str, *shape: int) -> None:
        expected[name] = random.standard_normal(shape).astype(np.float32)
        tensors.append((name, expected[name].tobytes()))

    def packed(name: str, rows: int, columns: int) -> None:
        levels = random.integers(0, 16, (rows, columns // 32, 32))
        scales = random.uniform(0.5, 2, (rows, columns // 32)).astype(np.float16)
        content = b"".join(
            scales[r, b].tobytes()
            + bytes(
                int(low) | int(high) << 4
                for low, high in zip(levels[r, b, :16], levels[r, b, 16:], strict=True)
            )
            for r in range(rows)
            for b in range(columns // 32)
        )
        values = (levels - 8) * scales[..., None].astype(np.float32)
        expected[name] = values.reshape(rows, columns)
        tensors.append((name, content))

    packed("emb.word", len(PIECES), WIDTH)
    plain("emb.pos", PLACES, WIDTH)
    plain("emb.type", 2, WIDTH)
    for name in ("emb.ln.w", "emb.ln.b"):
        plain(name, WIDTH)
    for name in ("q", "k", "v", "ao"):
        packed(f"l0.{name}.w", WIDTH, WIDTH)
        plain(f"l0.{name}.b", WIDTH)
    packed("l0.fi.w", INNER, WIDTH)
    plain("l0.fi.b", INNER)
    packed("l0.fo.w", WIDTH, INNER)
    plain("l0.fo.b", WIDTH)
    for name in ("aln.w", "aln.b", "oln.w", "oln.b"):
        plain(f"l0.{name}", WIDTH)

    blob = "".join(PIECES).encode()
    offsets = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)])
    head = b"E5S1" + struct.pack(
        "<I7ifi", 1, WIDTH, LAYERS, 2, INNER, len(PIECES), PLACES, 2, 1e-12, 32
    )
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(blob))
    head += offsets.astype("<u4").tobytes()
    head += (-np.arange(len(PIECES), dtype="<f4") / 8).tobytes() + blob
    head += struct.pack("<iI", 1, 5) + bytes(5) + struct.pack("<i", len(tensors))
    size = len(head) + sum(2 + len(name) + 21 for name, _ in tensors)
    body = b""
    for name, content in tensors:
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", 0, 0, size + len(body), len(content))
        body += content
    return head + body, expected


def test_weights_come_out_as_they_went_in() -> None:
    content, expected = written(np.random.default_rng(0))
    config, pieces, weights = e5_small.read(content)
    assert (config["hidden_size"], config["vocab_size"]) == (WIDTH, len(PIECES))
    assert [piece for piece, _ in pieces] == PIECES
    names = {
        "embeddings.word_embeddings.weight": "emb.word",
        "embeddings.LayerNorm.bias": "emb.ln.b",
        "encoder.layer.0.attention.self.key.weight": "l0.k.w",
        "encoder.layer.0.attention.output.dense.bias": "l0.ao.b",
        "encoder.layer.0.intermediate.dense.weight": "l0.fi.w",
        "encoder.layer.0.output.dense.weight": "l0.fo.w",
        "encoder.layer.0.output.LayerNorm.weight": "l0.oln.w",
    }
    for name, own in names.items():
        np.testing.assert_array_equal(weights[name].numpy(), expected[own])


def test_pieces_that_texts_need_are_kept() -> None:
    _, pieces, _ = e5_small.read(written(np.random.default_rng(0))[0])
    kept = {PIECES[i] for i in e5_small.needed(pieces, ["the cat sat"] * 4, [])}
    assert {"▁the", "▁cat", "▁s", "at"} <= kept
    assert "ж" in kept
    assert "▁1994" in kept
    assert "語" not in kept
    rare = {PIECES[i] for i in e5_small.needed(pieces, ["the cat sat"] * 3, [])}
    assert "▁cat" not in rare


def test_the_folder_embeds(tmp_path: Path) -> None:
    config, pieces, weights = e5_small.read(written(np.random.default_rng(0))[0])
    e5_small.write(tmp_path / "embedder", config, pieces, weights)
    embedder = SentenceTransformer(str(tmp_path / "embedder"), device="cpu")
    assert embedder.prompts["query"] == "query: "
    assert embedder.tokenizer.tokenize("the  cat\nsat") == ["▁the", "▁cat", "▁s", "at"]
    vectors = embedder.encode(["the cat", "the sat"], convert_to_tensor=True)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert not torch.allclose(vectors[0], vectors[1])


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="E5S1"):
        e5_small.read(b"GGUF" + bytes(100))
