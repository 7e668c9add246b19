"""A transformer as OpenVINO compiles it: the same embeddings sooner, on a CPU (extra openvino)."""

from __future__ import annotations

import functools
import threading
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qrag_retriever.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

Backend = Literal["torch", "openvino"]

_TOLERANCE = 1e-3
# lengths of the padded inputs with which a compiled transformer is compared with the original
_PROBES = ((3, 7), (16, 5, 11))


def check_backend(backend: str, device: str | None, dtype: str) -> str | None:
    """The device for a backend; ``None``: any.

    Raises:
        ConfigError: If the backend is unknown, or OpenVINO is asked for another device than the
            CPU or another precision than float32.
    """
    if backend == "torch":
        return device
    if backend != "openvino":
        raise ConfigError(f"backend={backend!r} is not known; choose 'torch' or 'openvino'.")
    if device not in (None, "cpu"):
        raise ConfigError(f"backend='openvino' computes on the CPU, not on {device!r}.")
    if dtype != "float32":
        raise ConfigError(f"backend='openvino' computes in float32; leave out dtype={dtype!r}.")
    return "cpu"


class CompiledTransformer:
    """Token ids and mask to token embeddings, on the CPU; any number of threads may call it.

    Args:
        transformer: What is compiled, as its weights are now.

    Raises:
        MissingDependencyError: If OpenVINO is not installed.
        ConfigError: If it cannot compile the transformer, or gives other embeddings.
    """

    def __init__(self, transformer: nn.Module) -> None:
        try:
            import openvino
        except ImportError as error:
            purpose = "backend='openvino'"
            raise MissingDependencyError.of(purpose, "OpenVINO", "openvino") from error
        module = _TokenEmbeddings(transformer).eval()
        vocabulary: int = transformer.config.vocab_size  # type: ignore[assignment, union-attr]
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the tracer's, about shapes that do not vary
                model = openvino.convert_model(module, example_input=_probe(_PROBES[0], vocabulary))
            settings = {
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            }
            compiled = _core().compile_model(model, "CPU", settings)
        except Exception as error:
            raise ConfigError(
                f"OpenVINO cannot compile this encoder ({type(error).__name__}: {error}); leave "
                "out backend='openvino'."
            ) from error
        self._new_request: Callable[[], Any] = compiled.create_infer_request
        self._of_thread = threading.local()
        self._compare(module, vocabulary)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token embeddings, float32 ``[n, L, width]``, of ids and mask, int64 ``[n, L]``."""
        request = getattr(self._of_thread, "request", None)
        if request is None:  # one request computes one batch at a time
            request = self._of_thread.request = self._new_request()
        return torch.from_numpy(request.infer((ids.numpy(), mask.numpy()))[0].copy())

    def _compare(self, module: nn.Module, vocabulary: int) -> None:
        for lengths in _PROBES:
            ids, mask = _probe(lengths, vocabulary)
            with torch.no_grad():
                expected = module(ids, mask)
            apart = (self(ids, mask) - expected)[mask.bool()].abs().max()
            if not apart <= _TOLERANCE * expected.abs().max():
                raise ConfigError(
                    f"OpenVINO gives embeddings of this encoder that are off by {apart:.2g}; leave "
                    "out backend='openvino'."
                )


@functools.cache
def _core() -> Any:
    """OpenVINO's one core of this process.

    A core gives the thread that first compiles with it a stack for signal handlers and takes that
    away when it goes: the second of two cores would put back the freed one of the first, and the
    next Ctrl-C would be a crash.
    """
    import openvino

    return openvino.Core()


class _TokenEmbeddings(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        outputs = self.transformer(input_ids=ids, attention_mask=mask, return_dict=True)
        result: Tensor = outputs.last_hidden_state
        return result


def _probe(lengths: tuple[int, ...], vocabulary: int) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return (1 + torch.arange(mask.numel()).view_as(mask) % (vocabulary - 1)) * mask, mask
