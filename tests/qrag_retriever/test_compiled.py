from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from qrag_retriever import ChunkIndex, QRAGModel
from qrag_retriever.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["mary went there", "a", "", "john took the milk and moved to the office, then left it."]
STATES = [("where is mary", ["mary went", "john took"]), ("who", [])]


@pytest.fixture(scope="module")
def openvino() -> Any:
    return pytest.importorskip("openvino")


def models(folder: Path) -> tuple[QRAGModel, QRAGModel]:
    compiled = QRAGModel.from_encoder(folder, backend="openvino")
    return QRAGModel.from_encoder(folder, device="cpu"), compiled


@pytest.fixture(scope="module")
def pair(tiny_encoder: Path, openvino: Any) -> tuple[QRAGModel, QRAGModel]:
    """Plain and compiled, shared as compiling takes seconds: do not change their weights."""
    return models(tiny_encoder)


@pytest.mark.parametrize("fixture", ["tiny_encoder", "tiny_xlm_roberta", "tiny_qwen3"])
def test_embeddings_are_those_of_torch(
    fixture: str, request: pytest.FixtureRequest, openvino: Any
) -> None:
    plain, compiled = models(request.getfixturevalue(fixture))
    calls: list[tuple[int, ...]] = []
    original = compiled.action_encoder._compiled

    def counted(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(ids.shape))
        assert original is not None
        return original(ids, mask)

    compiled.action_encoder._compiled = counted  # type: ignore[assignment]
    np.testing.assert_allclose(
        compiled.encode_actions(TEXTS), plain.encode_actions(TEXTS), atol=1e-5
    )
    assert calls  # or torch would have been compared with itself
    np.testing.assert_allclose(
        compiled.encode_states(STATES), plain.encode_states(STATES), atol=1e-5
    )


def test_threads_do_not_disturb_each_other(pair: tuple[QRAGModel, QRAGModel]) -> None:
    plain, compiled = pair
    texts = [" ".join(["mary", "john", "milk"][: 1 + n % 3] * (1 + n % 7)) for n in range(40)]
    expected = [plain.encode_actions([text])[0] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: compiled.encode_actions([text])[0], texts))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_index_of_one_backend_serves_the_other(
    pair: tuple[QRAGModel, QRAGModel], tmp_path: Path
) -> None:
    plain, compiled = pair
    assert compiled.fingerprint == plain.fingerprint
    index = ChunkIndex.from_texts(["mary went there", "john took the milk"], model=compiled)
    index.save(tmp_path / "index")
    assert len(ChunkIndex.load(tmp_path / "index", model=plain)) == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_use_it_too(again: Any, pair: tuple[QRAGModel, QRAGModel]) -> None:
    plain, compiled = (model.action_encoder for model in pair)
    copied = again(compiled)
    assert copied.backend == "openvino"
    assert copied._compiled is not None
    assert copied._compiled is not compiled._compiled
    ids = [[2, 7, 3], [2, 9, 8, 11, 3]]
    torch.testing.assert_close(copied.encode(ids), plain.encode(ids), atol=1e-5, rtol=0)


def test_training_goes_back_to_torch(tiny_encoder: Path, openvino: Any) -> None:
    plain, compiled = models(tiny_encoder)
    for model in (plain, compiled):
        model.train()
        with torch.no_grad():
            next(model.action_encoder.parameters()).mul_(-1.5)
        model.eval()
    np.testing.assert_array_equal(compiled.encode_actions(TEXTS), plain.encode_actions(TEXTS))


def test_new_weights_are_compiled(tiny_encoder: Path, openvino: Any) -> None:
    plain, compiled = models(tiny_encoder)
    doubled = {name: 2 * weight for name, weight in plain.state_dict().items()}
    for model in (plain, compiled):
        model.load_state_dict(doubled)
    np.testing.assert_allclose(
        compiled.encode_actions(TEXTS), plain.encode_actions(TEXTS), atol=1e-5
    )
    assert compiled.action_encoder._compiled is not None


def test_gradients_are_torchs(pair: tuple[QRAGModel, QRAGModel]) -> None:
    expected, found = (
        torch.autograd.grad(
            model.action_encoder([[2, 7, 3]]).sum(),
            [weight for _, weight in model.action_encoder.named_parameters()],
            allow_unused=True,
        )
        for model in pair
    )
    assert any(gradient is not None for gradient in found)
    torch.testing.assert_close(found, expected)


def test_an_encoder_that_comes_out_differently(
    tiny_encoder: Path, openvino: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = openvino.convert_model

    def spoilt(module: torch.nn.Module, **arguments: Any) -> Any:
        other = copy.deepcopy(module)
        with torch.no_grad():
            next(other.parameters()).mul_(-1.5)
        return convert(other, **arguments)

    monkeypatch.setattr(openvino, "convert_model", spoilt)
    with pytest.raises(ConfigError, match=r"off by .*leave out backend"):
        QRAGModel.from_encoder(tiny_encoder, backend="openvino")


def test_an_encoder_that_cannot_be_compiled(
    tiny_encoder: Path, openvino: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(module: torch.nn.Module, **arguments: Any) -> Any:
        raise RuntimeError("unsupported operation")

    monkeypatch.setattr(openvino, "convert_model", fails)
    with pytest.raises(ConfigError, match=r"unsupported operation.*leave out backend"):
        QRAGModel.from_encoder(tiny_encoder, backend="openvino")


def test_not_installed(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"qrag-retriever\[openvino\]"):
        QRAGModel.from_encoder(tiny_encoder, backend="openvino")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "onnx"}, "'onnx' is not known; choose 'torch' or 'openvino'"),
        ({"backend": "openvino", "device": "cuda:0"}, "on the CPU, not on 'cuda:0'"),
        ({"backend": "openvino", "dtype": "bfloat16"}, "computes in float32"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, str], message: str, tiny_encoder: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        QRAGModel.from_encoder(tiny_encoder, **settings)  # type: ignore[arg-type]


def test_ctrl_c_works_when_compiled_models_are_gone(tiny_encoder: Path, openvino: Any) -> None:
    code = f"""
import gc, os, signal
from qrag_retriever import QRAGModel

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
model = QRAGModel.from_encoder({str(tiny_encoder)!r}, backend="openvino")
models = [model.state_encoder, model.action_encoder]
del model
while models:
    models.pop(0)
    gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    # in a process of its own: what goes wrong here ends the process
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "interrupted\n"
