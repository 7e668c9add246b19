"""Texts as numbers: every distinct text is tokenised once and embedded as seldom as allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.encoder import Encoder
    from qrag_retriever.model import QRAGModel


class TextTable:
    """The texts met so far, with their token ids.

    Gives the token ids that `QRAGModel.state_ids` and `QRAGModel.action_ids` give, without
    tokenising a text again.

    Args:
        model: Whose tokenizers and limits apply.
    """

    def __init__(self, model: QRAGModel) -> None:
        self._model = model
        self._layout = model.state_layout
        self._numbers: dict[str, int] = {}
        self._texts: list[str] = []
        self._actions: list[list[int]] = []
        self._parts: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def numbers(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The numbers of texts, int64 ``[n]``; new ones get the next numbers."""
        known = self._numbers
        for text in texts:
            if text not in known:
                known[text] = len(known)
                self._texts.append(text)
        return np.array([known[text] for text in texts], dtype=np.int64)

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """The texts of numbers."""
        return [self._texts[number] for number in numbers]

    def action_ids(self, numbers: Sequence[int]) -> list[list[int]]:
        """Token ids of texts for the action encoder."""
        missing = self._texts[len(self._actions) :]
        if missing:
            self._actions.extend(self._model.action_ids(missing))
        return [self._actions[number] for number in numbers]

    def state_ids(self, states: Sequence[tuple[str, Sequence[str]]]) -> list[list[int]]:
        """Token ids of states for the state encoder."""
        prompt = self._model.config.query_prompt
        states = [(prompt + query, chunks) for query, chunks in states]
        texts = {text for query, chunks in states for text in (query, *chunks)}
        new = [text for text in texts if text not in self._parts]
        tokens = self._model.state_encoder.tokenize(new)
        self._parts.update(zip(new, tokens, strict=True))
        return [
            self._layout.build(self._parts[query], [self._parts[chunk] for chunk in chunks])[0]
            for query, chunks in states
        ]


class ChunkEmbeddings:
    """Embeddings of the chunks in play by the trained and by the target action encoder.

    A text has one row, however often it occurs. After `advance`, all texts are embedded anew when
    they are next asked for; with ``refresh_every`` only every so many updates, apart from those
    marked as support, whose embeddings are always those of the current weights, and those that
    were chosen since: an outdated embedding that looks good must not be chosen again and again.

    Args:
        encoders: The trained and the target action encoder.
        table: The texts.
        refresh_every: Updates that the embedding of a background text lasts; 0: none.
    """

    def __init__(
        self, encoders: tuple[Encoder, Encoder], table: TextTable, refresh_every: int = 0
    ) -> None:
        self._encoders = encoders
        self._table = table
        self._refresh_every = refresh_every
        self._update = 0
        self.embedded = 0
        self._vectors: tuple[Tensor, Tensor]
        self._clear()

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """All rows, trained and target, each float32 ``[rows, d]``."""
        return self._vectors

    def advance(self) -> None:
        """The weights have changed."""
        self._update += 1
        if self._refresh_every == 0:
            self._clear()

    def mark_support(self, numbers: NDArray[np.int64]) -> None:
        """Always embed these texts with the current weights."""
        self._grow()
        self._is_support[numbers] = True

    def mark_chosen(self, numbers: Sequence[int]) -> None:
        """Embed these texts anew after the update, as support is anyway."""
        background = np.asarray(numbers)[~self._is_support[numbers]]
        due_next = self._update + 1 - self._refresh_every
        self._stamp[background] = np.minimum(self._stamp[background], due_next)

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of texts in `vectors`, embedded now where they have to be."""
        self._grow()
        # in order of occurrence, so that batches do not depend on what the table met before
        unique = numbers[np.sort(np.unique(numbers, return_index=True)[1])]
        age = self._update - self._stamp[unique]
        lifetime = np.where(self._is_support[unique], 1, max(self._refresh_every, 1))
        due = unique[(self._row[unique] < 0) | (age >= lifetime)]
        if len(due):
            self._embed(due)
        return self._row[numbers]

    def _embed(self, due: NDArray[np.int64]) -> None:
        new = due[self._row[due] < 0]
        rows = len(self._vectors[0])
        self._row[new] = np.arange(rows, rows + len(new))
        inputs = self._table.action_ids(due.tolist())
        place = torch.from_numpy(self._row[due])
        trained, target = self._encoders
        fresh = trained.encode(inputs)
        both = fresh, fresh if target is trained else target.encode(inputs)
        vectors = []
        for old, fresh in zip(self._vectors, both, strict=True):
            extended = torch.cat([old.to(fresh), fresh.new_empty(len(new), fresh.shape[1])])
            extended[place.to(fresh.device)] = fresh
            vectors.append(extended)
        self._vectors = (vectors[0], vectors[1])
        self._stamp[due] = self._update
        self.embedded += len(due)

    def state_dict(self) -> dict[str, Any]:
        """The embeddings that outlast an update, by text; plain lists and tensors."""
        kept = np.flatnonzero(self._row >= 0) if self._refresh_every else np.zeros(0, dtype=int)
        rows = torch.from_numpy(self._row[kept])
        return {
            "update": self._update,
            "texts": self._table.texts(kept.tolist()),
            "stamp": self._stamp[kept].tolist(),
            "is_support": self._is_support[kept].tolist(),
            "vectors": [vectors[rows.to(vectors.device)] for vectors in self._vectors],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._update = state["update"]
        kept = self._table.numbers(state["texts"])
        self._clear()
        self._row[kept] = np.arange(len(kept))
        self._stamp[kept] = state["stamp"]
        self._is_support[kept] = state["is_support"]
        trained, target = (vectors.to(self._encoders[0].device) for vectors in state["vectors"])
        self._vectors = (trained, target)

    def _clear(self) -> None:
        size = len(self._table)
        self._row: NDArray[np.int64] = np.full(size, -1, dtype=np.int64)
        self._stamp: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self._is_support: NDArray[np.bool_] = np.zeros(size, dtype=bool)
        empty = torch.empty(0, self._encoders[0].dimension)
        self._vectors = (empty, empty)

    def _grow(self) -> None:
        more = len(self._table) - len(self._row)
        if more > 0:
            more = max(more, len(self._row))
            self._row = np.append(self._row, np.full(more, -1))
            self._stamp = np.append(self._stamp, np.zeros(more, dtype=np.int64))
            self._is_support = np.append(self._is_support, np.zeros(more, dtype=bool))


def embed(
    encoder: Encoder, inputs: Sequence[Sequence[int]], batch_tokens: int | None = None
) -> Tensor:
    """Embed inputs with gradients: equal ones once, in padded batches of similar length.

    Args:
        encoder: The encoder.
        inputs: n sequences of token ids, special tokens included.
        batch_tokens: Most tokens of a padded batch; ``None``: what suits the device.

    Returns:
        Embeddings, float32 ``[n, d]``.
    """
    slots: dict[tuple[int, ...], int] = {}
    rows = [slots.setdefault(tuple(ids), len(slots)) for ids in inputs]
    unique = list(slots)
    parts: list[Tensor] = []
    place: dict[int, int] = {}
    for batch in encoder.batches(unique, batch_tokens):
        parts.append(encoder([unique[row] for row in batch]).float())
        place.update({row: len(place) + i for i, row in enumerate(batch)})
    index = torch.tensor([place[row] for row in rows], device=parts[0].device)
    return torch.cat(parts)[index]
