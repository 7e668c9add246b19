"""One text encoder: texts to token ids, token ids to vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from qrag_retriever.compiled import CompiledTransformer
from qrag_retriever.errors import ConfigError, ModelFormatError
from qrag_retriever.locks import Lock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qrag_retriever.compiled import Backend

TokenIds = Sequence[int]

# Tokens of a padded batch. A CPU is slower with larger ones, whose activations leave its cache;
# those of a narrow encoder take less of it.
CPU_BATCH_TOKENS = 1024
_CPU_BATCH_NUMBERS = 1 << 18
GPU_BATCH_TOKENS = 65536


def default_device() -> str:
    """The device to compute on: a GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Encoder(nn.Module):
    """A transformer with pooling, as Sentence-Transformers modules, and a factor on its output.

    Args:
        modules: Sentence-Transformers modules, the first a ``Transformer``; what they hold is
            shared, not copied.
        scale: Factor on the embedding.

    Raises:
        ConfigError: If the first module is no ``Transformer``, or it has no tokenizer.
        ModelFormatError: If the tokenizer knows no word, as if its files were missing.
    """

    def __init__(self, modules: Sequence[nn.Module], scale: float = 1.0) -> None:
        super().__init__()
        if not modules or not isinstance(modules[0], Transformer) or modules[0].tokenizer is None:
            kind = type(modules[0]).__name__ if modules else "nothing"
            raise ConfigError(
                f"An encoder starts with a Transformer that has a tokenizer, not with {kind}; "
                "choose an embedder that is built on a transformer."
            )
        tokenizer: Any = modules[0].tokenizer
        few = len(tokenizer) < 1000  # to list a large vocabulary takes time
        if few and set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ModelFormatError(
                "The tokenizer knows no word: its files (such as tokenizer.json) are missing or "
                "damaged. Copy or download the model again, or save the tokenizer beside it."
            )
        self.layers = nn.Sequential(*modules)
        self.scale = scale
        self._tokenizer_lock = Lock()
        self.prefix, self.suffix = self._special_tokens()
        self.use("torch")

    def use(self, backend: Backend) -> None:
        """Choose what runs the transformer where no gradients are wanted.

        Args:
            backend: ``"torch"``; or ``"openvino"``, which compiles again when weights change.
                Errors as `CompiledTransformer`.
        """
        self.backend = backend
        openvino = backend == "openvino"
        self._compiled = CompiledTransformer(self.transformer.model) if openvino else None
        self._compiled_at = self.version if openvino else 0

    @property
    def transformer(self) -> Transformer:
        """The first module, which holds the tokenizer and the weights."""
        return cast("Transformer", self.layers[0])

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @property
    def dimension(self) -> int:
        """Length d of an embedding."""
        for module in reversed(self.layers):
            size = getattr(module, "get_embedding_dimension", lambda: None)()
            if size:
                return int(size)
        raise ConfigError("The embedder does not tell the length of its embeddings.")

    @property
    def separator(self) -> int:
        """Token between the parts of a state: the tokenizer's own ``sep``, else ``eos``."""
        tokenizer: Any = self.transformer.tokenizer
        token = tokenizer.sep_token_id
        if token is None:
            token = tokenizer.eos_token_id
        if token is None:
            raise ConfigError(
                "The tokenizer has neither a sep nor an eos token to separate the chunks of a "
                "state; set one of them on the tokenizer and save the embedder again."
            )
        return int(token)

    @property
    def window(self) -> int:
        """Most tokens the transformer can read at once, special tokens included."""
        limits = []
        for name, module in self.transformer.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                # RoBERTa and its kin count positions from the padding index on
                unused = 0 if module.padding_idx is None else module.padding_idx + 1
                limits.append(module.num_embeddings - unused)
        if not limits:
            limits.append(getattr(self.transformer.config, "max_position_embeddings", None) or 512)
        return int(min(limits))

    def tokenize(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Token ids of texts, without special tokens around them and without a limit.

        Args:
            texts: Texts.
            allow_special: Read a special token's text as that token. Off for the parts of a state.
        """
        if not texts:
            return []
        tokenizer: Any = self.transformer.tokenizer
        with self._tokenizer_lock:  # the call sets flags on the tokenizer that threads share
            encoded = tokenizer(
                list(texts),
                add_special_tokens=False,
                truncation=False,
                padding=False,
                split_special_tokens=not allow_special,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        return [list(ids) for ids in encoded["input_ids"]]

    def forward(self, inputs: Sequence[TokenIds]) -> Tensor:
        """Embed inputs as one padded batch, with gradients where they are on.

        Args:
            inputs: n sequences of token ids, special tokens included.

        Returns:
            Embeddings, [n, d], in the dtype of the weights.
        """
        tokenizer: Any = self.transformer.tokenizer
        # No token at all (an empty text, a tokenizer without special tokens) is read as padding:
        # attention to nothing is not a number.
        longest = max(1, *map(len, inputs))
        pad = tokenizer.pad_token_id or 0
        ids = torch.full((len(inputs), longest), pad, dtype=torch.long)
        mask = torch.zeros((len(inputs), longest), dtype=torch.long)
        for row, sequence in enumerate(inputs):
            ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence) or 1] = 1
        features: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
        }
        transformer, *others = self.layers
        if self._compiled is not None and not torch.is_grad_enabled():
            features["token_embeddings"] = self._compiled(ids, mask)
        else:
            features = transformer(features)
        for module in others:
            features = module(features)
        embedding: Tensor = features["sentence_embedding"]
        return embedding * self.scale

    @torch.no_grad()
    def encode(
        self,
        inputs: Sequence[TokenIds],
        batch_tokens: int | None = None,
        *,
        show_progress: bool = False,
        unit: str = "text",
    ) -> Tensor:
        """Embed many inputs: equal ones once, in batches of similar length, without dropout.

        Args:
            inputs: n sequences of token ids, special tokens included.
            batch_tokens: Most tokens of a padded batch.
            show_progress: Show a progress bar.
            unit: What the progress bar counts.

        Returns:
            Embeddings, float32 [n, d], on the encoder's device.
        """
        if self._compiled is not None and self._compiled_at != self.version:
            self.use(self.backend)
        slots: dict[tuple[int, ...], int] = {}
        rows = [slots.setdefault(tuple(ids), len(slots)) for ids in inputs]
        unique = list(slots)
        result = torch.empty((len(unique), self.dimension), device=self.device)
        was_training = self.training
        if was_training:
            self.eval()
        try:
            with tqdm(total=len(unique), unit=unit, disable=not show_progress) as bar:
                for batch in self.batches(unique, batch_tokens):
                    result[batch] = self([unique[row] for row in batch]).float()
                    bar.update(len(batch))
        finally:
            if was_training:
                self.train()
        if len(unique) == len(rows):
            return result
        return result[torch.tensor(rows, device=self.device)]

    def digest(self, **settings: object) -> str:
        """SHA-256 of the weights, the kinds of modules and these settings."""
        kinds = [
            [type(layer).__name__, str(getattr(layer, "pooling_mode", "")), *_activation(layer)]
            for layer in list(self.layers)[1:]
        ]
        shape = {**settings, "layers": kinds}
        digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.layers.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def version(self) -> int:
        """A number that grows whenever weights change; torch counts that."""
        return sum(weight._version for weight in self.parameters())  # noqa: SLF001

    def batches(
        self, inputs: Sequence[TokenIds], batch_tokens: int | None = None
    ) -> Iterator[list[int]]:
        """Cut inputs into batches of similar length.

        Args:
            inputs: n sequences of token ids.
            batch_tokens: Most tokens of a padded batch; ``None``: what suits the device.

        Yields:
            Numbers of inputs, those of the longest first.
        """
        if batch_tokens is None:
            on_cpu = max(CPU_BATCH_TOKENS, _CPU_BATCH_NUMBERS // self.dimension)
            batch_tokens = on_cpu if self.device.type == "cpu" else GPU_BATCH_TOKENS
        batch: list[int] = []
        for row in sorted(range(len(inputs)), key=lambda row: -len(inputs[row])):
            if batch and (len(batch) + 1) * len(inputs[batch[0]]) > batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        tokenizer: Any = self.transformer.tokenizer
        whole = tokenizer("a", return_attention_mask=False)["input_ids"]
        inner = self.tokenize(["a"])[0]
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return tuple(whole[:start]), tuple(whole[start + len(inner) :])
        raise ConfigError(
            "The tokenizer changes a text when it adds special tokens; such an embedder cannot "
            "read a state of several parts."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.use(self.backend)


def _activation(layer: nn.Module) -> list[str]:
    """What a layer does to its output, where that is not what `Dense` does by default."""
    function = getattr(layer, "activation_function", None)
    return [] if function is None or type(function) is nn.Tanh else [repr(function)]


def with_pooling(
    modules: Sequence[nn.Module], pooling: str | None, normalize: bool | None
) -> list[nn.Module]:
    """The modules of an embedder with another pooling, or with or without normalisation.

    Args:
        modules: Sentence-Transformers modules.
        pooling: ``"mean"``, ``"cls"``, ``"lasttoken"``, …; ``None`` keeps what is there.
        normalize: Whether embeddings get length 1; ``None`` keeps what is there.

    Raises:
        ConfigError: If the pooling is unknown, or there is none.
    """
    result = [module for module in modules if normalize is None or not _is_normalize(module)]
    if len(result) == 1 and isinstance(result[0], Transformer):
        if pooling is None:
            raise ConfigError("The embedder has no pooling; give pooling='mean', or another.")
        result.append(Pooling(result[0].get_embedding_dimension()))
    if pooling is not None:
        if pooling not in Pooling.POOLING_MODES:
            allowed = ", ".join(map(repr, Pooling.POOLING_MODES))
            raise ConfigError(f"pooling={pooling!r} is not known; choose one of {allowed}.")
        result = [
            Pooling(module.embedding_dimension, pooling_mode=pooling)
            if isinstance(module, Pooling)
            else module
            for module in result
        ]
    if normalize:
        result.append(Normalize())
    return result


def is_normalized(modules: Sequence[nn.Module]) -> bool:
    """Whether embeddings leave these modules with length 1."""
    return any(map(_is_normalize, modules))


def _is_normalize(module: nn.Module) -> bool:
    return isinstance(module, Normalize)
