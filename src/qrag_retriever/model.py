"""The Q-RAG model: a state encoder, an action encoder and their settings (paper §3.2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from torch import nn

from qrag_retriever import model_files, model_names, pretrained
from qrag_retriever.compiled import check_backend
from qrag_retriever.config import QRAGConfig
from qrag_retriever.encoder import Encoder, default_device, is_normalized, with_pooling
from qrag_retriever.errors import ConfigError, TruncationWarning
from qrag_retriever.fingerprint import Names, read_names
from qrag_retriever.state import StateLayout, check_chunks, check_query
from qrag_retriever.warn_once import WarnOnce

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qrag_retriever.compiled import Backend
    from qrag_retriever.positions import PositionMode

_T = TypeVar("_T")
DType = Literal["float32", "bfloat16", "float16"]
State = tuple[str, Sequence[str]]

# The released code divides mean-pooled embeddings by 10, so that Q starts in the range of rewards.
_UNNORMALIZED_SCALE = 0.1

# Settings that action embeddings depend on.
_OF_EMBEDDINGS = ("scale", "chunk_prompt", "max_chunk_tokens")

# Tokenizers that differ in vocabulary, case, accents or scripts read it differently.
_SPECIMEN = "Zoë's café (est. 1,987) isn't in São Paulo; ΑΘΗΝΑ, Москва and 東京 have_none of them."


class QRAGModel(nn.Module):
    """Q(s, a) = ⟨E_s(s), R(ρ) E_a(a)⟩: the two encoders E_s, E_a and how to use them.

    Make one with `from_encoder` (untrained) or `from_pretrained` (a Q-RAG model).

    Args:
        state_encoder: E_s, reads a query and the chunks found so far.
        action_encoder: E_a, reads one chunk.
        config: Settings.

    Raises:
        ConfigError: If the encoders' embeddings differ in length, or cannot be rotated, or a limit
            exceeds an encoder's window.
    """

    def __init__(self, state_encoder: Encoder, action_encoder: Encoder, config: QRAGConfig) -> None:
        super().__init__()
        self.state_encoder = state_encoder
        self.action_encoder = action_encoder
        self._warn_once = WarnOnce()
        self._kept_fingerprint: str | None = None
        self.config = config
        self.eval()

    @classmethod
    def from_encoder(
        cls,
        encoder: str | Path | SentenceTransformer | None = None,
        positions: PositionMode = "none",
        *,
        device: str | None = None,
        dtype: DType = "float32",
        backend: Backend = "torch",
        pooling: str | None = None,
        normalize: bool | None = None,
        trust_remote_code: bool = False,
        **config: Any,
    ) -> QRAGModel:
        """An untrained model: both encoders start as copies of one pretrained embedder.

        Args:
            encoder: Folder or hub name of a Sentence-Transformers or Transformers embedder, or a
                ``SentenceTransformer``, which is copied; ``None``: all-MiniLM-L6-v2, from the
                ``offline`` extra where that is installed.
            positions: How a chunk's place enters its Q-value, see `QRAGConfig`.
            device: Where to compute; ``None``: a GPU if there is one.
            dtype: Precision of the weights; embeddings always leave as float32.
            backend: ``"openvino"`` (extra ``openvino``) embeds sooner on a CPU, in float32.
            pooling: ``"mean"``, ``"cls"`` or ``"lasttoken"``; ``None``: the embedder's own.
            normalize: Embeddings of length 1; ``None``: as the embedder does.
            trust_remote_code: Let the embedder's own code run.
            **config: Further settings of `QRAGConfig`. Left out, ``scale`` is 1 for normalised
                embeddings and 0.1 otherwise, prompts and limits are the embedder's own, and the
                state follows the document's order unless ``positions="none"``.

        Raises:
            ModelFormatError: If there is no such embedder, or its files are unusable.
            UnsafeModelError: If its folder holds code and ``trust_remote_code`` is off.
            ConfigError: If a setting is unknown or does not fit the embedder.
        """
        embedder = pretrained.load_embedder(encoder, trust_remote_code=trust_remote_code)
        pretrained.require_usable(embedder)
        modules = with_pooling(list(embedder.children()), pooling, normalize)
        actions = Encoder(copy.deepcopy(modules))
        states = Encoder(modules)
        prompts = embedder.prompts or {}
        defaults: dict[str, Any] = {
            "positions": positions,
            "scale": 1.0 if is_normalized(modules) else _UNNORMALIZED_SCALE,
            "state_order": "retrieval" if positions == "none" else "document",
            "query_prompt": prompts.get("query") or "",
            "chunk_prompt": prompts.get("document") or prompts.get("passage") or "",
            "max_chunk_tokens": min(actions.transformer.max_seq_length or 512, actions.window),
            "max_state_tokens": states.window,
        }
        settings = QRAGConfig.from_dict({**defaults, **config})
        return cls(states, actions, settings).place(device, dtype, backend)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: DType = "float32",
        backend: Backend = "torch",
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
    ) -> QRAGModel:
        """Load a Q-RAG model from a folder or the model hub.

        Args:
            path: Folder that `save_pretrained` wrote, name of a model that comes with the package,
                or a hub name.
            device: Where to compute; ``None``: a GPU if there is one.
            dtype: Precision of the weights.
            backend: ``"openvino"`` (extra ``openvino``) embeds sooner on a CPU, in float32.
            revision: Branch, tag or commit on the hub.
            token: Access token for the hub.
            local_files_only: Use only what was downloaded before.
            trust_remote_code: Let the model's own code run.

        Raises:
            ModelFormatError: If there is no such model, or its files are incomplete or corrupt.
            UnsafeModelError: If the folder holds code or pickles and ``trust_remote_code`` is off.
        """
        folder = model_names.find(path, revision, token, local_files_only=local_files_only)
        config, states, actions = model_files.load(folder, trust_remote_code=trust_remote_code)
        model = cls(Encoder(states, config.scale), Encoder(actions, config.scale), config)
        names = read_names(folder)
        if names is not None and names.weights == model.fingerprint:
            model._kept_fingerprint = names.fingerprint
        return model.place(device, dtype, backend)

    def save_pretrained(self, path: str | Path, *, compact: bool = False) -> Path:
        """Write the model to a folder, whole or not at all.

        The folder also loads as ``SentenceTransformer(path)``: ``encode_query`` is the state
        encoder, ``encode_document`` the action encoder (without ``scale`` and positions).

        Args:
            path: The folder; a model already there is replaced.
            compact: Write a form of a quarter of the size or less, which `from_pretrained` alone
                loads: 8-bit weights, shared ones once, a SHA-256 of each file.

        Returns:
            The folder.

        Raises:
            InvalidInputError: If the folder holds something other than a Q-RAG model.
        """
        with self.saving(path, compact=compact):
            pass
        return Path(path).expanduser()

    @contextmanager
    def saving(self, path: str | Path, *, compact: bool = False) -> Iterator[Path]:
        """As `save_pretrained`; the folder takes its place when the block ends, or never.

        For what is saved together with a model: if that fails in the block, nothing has changed.

        Yields:
            Where the files are until then.
        """
        encoders, names = self.sentence_transformer(), self._names()
        with model_files.saving(encoders, self.config, Path(path), compact, names) as new:
            yield new

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model to the model hub.

        Args:
            repo_id: ``"name"`` or ``"organisation/name"``.
            private: Hide it from others, when the repository is made.
            token: Access token for the hub.

        Returns:
            Address of the commit.
        """
        encoders, names = self.sentence_transformer(), self._names()
        return model_files.push(encoders, self.config, repo_id, private, token, names)

    def sentence_transformer(self) -> SentenceTransformer:
        """The two encoders as one Sentence-Transformers model with a query and a document route."""
        config = self.config
        states, actions = self.state_encoder.transformer, self.action_encoder.transformer
        if states is not actions:
            states.max_seq_length = config.max_query_tokens or self.state_layout.window
        actions.max_seq_length = self._chunk_limit
        router = Router.for_query_document(
            query_modules=list(self.state_encoder.layers),  # type: ignore[arg-type]
            document_modules=list(self.action_encoder.layers),  # type: ignore[arg-type]
        )
        return SentenceTransformer(
            modules=[router],
            device=str(self.device),
            prompts={"query": config.query_prompt, "document": config.chunk_prompt},
            similarity_fn_name="dot",
        )

    @property
    def config(self) -> QRAGConfig:
        """The settings; assign changed ones: ``model.config = model.config.replace(alpha=0.02)``.

        Raises:
            ConfigError: If what is assigned does not fit the encoders; nothing has changed then.
        """
        return self._config

    @config.setter
    def config(self, config: QRAGConfig) -> None:
        self._check(config)
        before = getattr(self, "_config", config)
        if any(getattr(before, name) != getattr(config, name) for name in _OF_EMBEDDINGS):
            self._kept_fingerprint = None
        self._config = config
        self.state_encoder.scale = self.action_encoder.scale = config.scale

    @property
    def dimension(self) -> int:
        """Length d of an embedding."""
        return self.action_encoder.dimension

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.action_encoder.device

    @property
    def state_layout(self) -> StateLayout:
        """How a state is put together from token ids."""
        encoder, config = self.state_encoder, self.config
        return StateLayout(
            prefix=encoder.prefix,
            suffix=encoder.suffix,
            separator=encoder.separator,
            window=config.max_state_tokens or encoder.window,
            query_limit=config.max_query_tokens,
            chunk_limit=config.max_chunk_tokens_in_state,
        )

    @property
    def fingerprint(self) -> str:
        """Names what makes action embeddings: equal fingerprints may share an index.

        The state encoder and the positions do not enter: they may change without embedding the
        chunks again.
        """
        return self._kept_fingerprint or self._own_fingerprint()

    def _own_fingerprint(self) -> str:
        config, encoder = self.config, self.action_encoder
        return encoder.digest(
            prompt=config.chunk_prompt,
            scale=config.scale,
            limit=self._chunk_limit,
            tokens=[encoder.prefix, *encoder.tokenize([_SPECIMEN]), encoder.suffix],
        )

    def place(
        self, device: str | None = None, dtype: DType = "float32", backend: Backend = "torch"
    ) -> QRAGModel:
        """Move to a device and a precision; ``None`` stands for a GPU if there is one.

        Raises:
            ConfigError: If dtype or backend is unknown, or the backend cannot be used so.
            MissingDependencyError: If OpenVINO is asked for and not installed.
        """
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in dtypes:
            raise ConfigError(f"dtype={dtype!r} is not known; choose one of {', '.join(dtypes)}.")
        device = check_backend(backend, device, dtype)
        if dtypes[dtype] != next(self.parameters()).dtype:
            # an index outlives a change of precision, so its name is that of the full weights
            self._kept_fingerprint = self.fingerprint
        device = device or default_device()
        try:
            self.to(device=device, dtype=dtypes[dtype])
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(f"device={device!r} cannot be used here ({error}).") from error
        for encoder in (self.state_encoder, self.action_encoder):
            encoder.use(backend)
        return self

    def encode_states(
        self,
        states: Sequence[State],
        *,
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed states (paper §3.2, E_s).

        Args:
            states: n pairs of a query and the chunks found so far, in the order of the state.
            batch_tokens: Most tokens of a padded batch; ``None``: what suits the device.
            show_progress: Show a progress bar.

        Returns:
            Embeddings, float32 [n, d], ``scale`` included.

        Raises:
            InvalidInputError: If a query is empty, or it or a chunk is not a text.
        """
        encoder, ids = self.state_encoder, self.state_ids(states)
        embeddings = encoder.encode(ids, batch_tokens, unit="state", show_progress=show_progress)
        return embeddings.cpu().numpy()

    def encode_actions(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed chunks (paper §3.2, E_a), not rotated.

        Args:
            texts: n chunks; equal ones are embedded once.
            batch_tokens: Most tokens of a padded batch; ``None``: what suits the device.
            show_progress: Show a progress bar.

        Returns:
            Embeddings, float32 [n, d], ``scale`` included.

        Raises:
            InvalidInputError: If a chunk is not a text.
        """
        encoder, ids = self.action_encoder, self.action_ids(texts)
        embeddings = encoder.encode(ids, batch_tokens, unit="chunk", show_progress=show_progress)
        return embeddings.cpu().numpy()

    def state_ids(self, states: Sequence[State]) -> list[list[int]]:
        """Token ids of states, for `state_encoder`. Arguments and errors as `encode_states`."""
        states = [(query, _reusable(chunks)) for query, chunks in states]
        texts: list[str] = []
        for query, chunks in states:
            check_query(query)
            check_chunks(chunks)
            texts.append(self.config.query_prompt + query)
            texts.extend(chunks)
        tokens = iter(self.state_encoder.tokenize(texts))
        layout, result = self.state_layout, []
        for _, chunks in states:
            ids, shortened = layout.build(next(tokens), [next(tokens) for _ in chunks])
            if shortened:
                self._warn_once(
                    "state",
                    f"A state of {len(chunks)} chunks is longer than the {layout.window} tokens "
                    "the state encoder reads; its longest parts were shortened evenly. Use "
                    "smaller chunks, a smaller k, or set max_chunk_tokens_in_state.",
                    TruncationWarning,
                )
            result.append(ids)
        return result

    def action_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of chunks, for `action_encoder`. Arguments and errors as `encode_actions`."""
        texts = _reusable(texts)
        check_chunks(texts)
        encoder, prompt = self.action_encoder, self.config.chunk_prompt
        tokens = encoder.tokenize([prompt + text for text in texts], allow_special=True)
        room = self._chunk_limit - len(encoder.prefix) - len(encoder.suffix)
        longer = sum(len(ids) > room for ids in tokens)
        if longer:
            self._warn_once(
                "chunk",
                f"{longer} of {len(texts)} chunks are longer than the {self._chunk_limit} tokens "
                "the action encoder reads; what lies beyond is not seen. Split the text into "
                "smaller chunks.",
                TruncationWarning,
            )
        return [[*encoder.prefix, *ids[:room], *encoder.suffix] for ids in tokens]

    def train(self, mode: bool = True) -> QRAGModel:
        """Switch training on or off; training changes the weights, so torch alone is used then."""
        if mode:
            self.weights_changed()
            self.state_encoder.use("torch")
            self.action_encoder.use("torch")
        return super().train(mode)

    def weights_changed(self) -> None:
        """Forget which full weights those in half precision were rounded from."""
        self._kept_fingerprint = None

    def _names(self) -> Names | None:
        if self._kept_fingerprint is None:
            return None
        return Names(self._own_fingerprint(), self._kept_fingerprint)

    @property
    def _chunk_limit(self) -> int:
        return self.config.max_chunk_tokens or self.action_encoder.window

    def _check(self, config: QRAGConfig) -> None:
        if not isinstance(config, QRAGConfig):
            raise ConfigError(f"config={config!r:.60} is no QRAGConfig; use config.replace(…).")
        states, actions = self.state_encoder.dimension, self.action_encoder.dimension
        if states != actions:
            raise ConfigError(
                f"The state encoder gives {states} dimensions and the action encoder {actions}; "
                "their inner product needs the same number."
            )
        if config.positions != "none" and actions % 4:
            raise ConfigError(
                f"Embeddings of {actions} dimensions cannot be rotated: positions="
                f"{config.positions!r} needs a multiple of 4. Use positions='none'."
            )
        limited = {"max_state_tokens": self.state_encoder, "max_chunk_tokens": self.action_encoder}
        for name, encoder in limited.items():
            limit = getattr(config, name)
            if limit is not None and limit > encoder.window:
                raise ConfigError(
                    f"{name}={limit} exceeds the {encoder.window} tokens the encoder can read; "
                    f"give at most {encoder.window}."
                )


def _reusable(items: Sequence[_T]) -> Sequence[_T]:
    """Items that may be read several times: those of a generator as a list."""
    return list(items) if isinstance(items, Iterator) else items
