from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tiny import COLOURS, tiny_model, write_questions
from torch import nn
from transformers import DistilBertModel, MPNetModel, PreTrainedModel

from own_code import bring_code
from qrag_retriever import QRAGModel
from qrag_retriever.errors import ConfigError, UnsafeModelError
from qrag_train.build import AdaptConfig, adapted, build_module, merge_lora
from qrag_train.cli import main
from qrag_train.scratch import ScratchConfig
from qrag_train.settings import PQNConfig
from qrag_train.texts import embed

SMALL = ScratchConfig(layers=2, dimension=32, heads=2, vocabulary=200, max_tokens=64)


def test_a_new_encoder_depends_on_texts_and_seed_alone() -> None:
    first, second, other = (
        build_module(scratch=SMALL, seed=seed, texts=lambda: COLOURS) for seed in (1, 1, 2)
    )
    vectors = [module.model.encode_actions(["red green"]) for module in (first, second, other)]
    assert (vectors[0] == vectors[1]).all()
    assert (vectors[0] != vectors[2]).any()
    assert first.model.config.positions == "none"
    assert first.budget == first.model.config.max_steps == 4


def test_episodes_may_be_shorter_than_the_models_budget() -> None:
    module = build_module(
        scratch=SMALL, max_steps=5, pqn=PQNConfig(max_steps=3), texts=lambda: COLOURS
    )
    assert (module.episode_steps, module.budget, module.model.config.max_steps) == (3, 5, 5)


def test_a_new_encoder_starts_from_nothing() -> None:
    with pytest.raises(ConfigError, match="no encoder to start from"):
        build_module(encoder="somewhere", scratch=SMALL, texts=lambda: COLOURS)


def test_training_goes_on_from_a_model_with_its_settings(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "encoder", "relative", max_steps=3).save_pretrained(
        tmp_path / "model"
    )
    same = build_module(str(folder)).model.config
    assert (same.positions, same.max_steps) == ("relative", 3)
    changed = build_module(str(folder), positions="none", max_steps=6).model.config
    assert (changed.positions, changed.max_steps) == ("none", 6)


def test_an_encoder_with_code_of_its_own_has_to_be_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    tiny_model(tmp_path / "encoder")
    own = bring_code(tmp_path / "encoder", tmp_path / "own")
    with pytest.raises(UnsafeModelError, match="Pass trust_remote_code=True"):
        build_module(str(own))
    model = build_module(str(own), trust_remote_code=True, max_steps=2).model
    folder = str(model.save_pretrained(tmp_path / "model"))
    questions = str(write_questions(tmp_path / "questions.jsonl", 50))
    output = f"--output={tmp_path / 'evaluation.json'}"
    for command, *options in (["evaluate", output], ["calibrate"]):
        assert main([command, folder, questions, *options]) == 1
        assert "trust_remote_code" in capsys.readouterr().err
        assert main([command, folder, questions, *options, "--trust_remote_code=true"]) == 0
    assert build_module(folder, trust_remote_code=True).model.config.max_steps == 2


def test_a_threshold_is_not_passed_on_to_other_weights(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "encoder", "relative", q_threshold=0.3)
    folder = str(model.save_pretrained(tmp_path / "model"))
    assert build_module(folder).model.config.q_threshold is None
    own = build_module(folder, settings={"q_threshold": 0.2}).model.config
    assert own.q_threshold == 0.2


def test_what_a_new_encoder_takes_of_the_settings_for_pretrained_ones() -> None:
    module = build_module(scratch=SMALL, texts=lambda: COLOURS, adapt=AdaptConfig(dropout=0.3))
    transformer = module.model.action_encoder.transformer.model
    assert transformer.get_input_embeddings().weight.requires_grad
    assert 0.3 in {m.p for m in transformer.modules() if isinstance(m, nn.Dropout)}
    for name, value in (("freeze_layers", 1), ("first_layers", 1), ("lora_rank", 4)):
        with pytest.raises(ConfigError, match=f"{name}={value} is for a pretrained encoder"):
            build_module(scratch=SMALL, texts=lambda: COLOURS, adapt=AdaptConfig(**{name: value}))


def test_what_is_frozen_dropped_and_left_out() -> None:
    model = build_module(scratch=SMALL, texts=lambda: COLOURS).model
    adapted(model, AdaptConfig(first_layers=1, dropout=0.3))
    for encoder in (model.state_encoder, model.action_encoder):
        transformer = encoder.transformer.model
        assert len(transformer.encoder.layer) == transformer.config.num_hidden_layers == 1
        assert not transformer.get_input_embeddings().weight.requires_grad
        dropout = {n: m.p for n, m in transformer.named_modules() if isinstance(m, nn.Dropout)}
        attention = {n for n in dropout if n.endswith("attention.self.dropout")}
        assert len(attention) == 1
        assert dropout == {n: 0.0 if n in attention else 0.3 for n in dropout}
    with pytest.raises(ConfigError, match="has 1 layers"):
        adapted(model, AdaptConfig(first_layers=2))


def test_frozen_layers_stay_as_they_are() -> None:
    model = build_module(scratch=SMALL, texts=lambda: COLOURS).model
    adapted(model, AdaptConfig(freeze_layers=1, dropout=0.2))
    for encoder in (model.state_encoder, model.action_encoder):
        frozen = {n for n, p in encoder.transformer.model.named_parameters() if not p.requires_grad}
        assert {n for n in frozen if "layer." in n} == {n for n in frozen if "layer.0." in n}
        assert any("layer.0.attention" in n for n in frozen)
        assert any("LayerNorm" in n and n.startswith("embeddings") for n in frozen)
        hidden = [layer.output.dropout.p for layer in encoder.transformer.model.encoder.layer]
        assert hidden == [0.0, 0.2]
        assert encoder.transformer.model.embeddings.dropout.p == 0.0
    with pytest.raises(ConfigError, match="freeze_layers=3, but the encoder has 2 layers"):
        adapted(model, AdaptConfig(freeze_layers=3))


def test_something_must_be_left_to_train(tmp_path: Path) -> None:
    tiny_model(tmp_path)  # of one layer
    with pytest.raises(ConfigError, match=r"freeze_layers=1 .* nothing is left to train"):
        build_module(str(tmp_path), adapt=AdaptConfig(freeze_layers=1))
    build_module(str(tmp_path), adapt=AdaptConfig(freeze_layers=0))


def test_lora_trains_little_and_merges_into_nothing_new() -> None:
    model = build_module(scratch=SMALL, texts=lambda: COLOURS).model
    before = model.encode_actions(["red green"])
    names = set(model.state_dict())
    adapted(model, AdaptConfig(lora_rank=2))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    merged = merge_lora(model)
    assert set(merged.state_dict()) == names
    assert merged.encode_actions(["red green"]) == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize(
    "values", [{"first_layers": 0}, {"freeze_layers": -1}, {"lora_rank": -1}, {"dropout": 1.0}]
)
def test_settings_are_checked(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        AdaptConfig(**values)


_MPNET = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}


def of_kind(folder: Path, kind: type[PreTrainedModel], sizes: dict[str, int]) -> QRAGModel:
    """A model whose encoders are small transformers of another architecture."""
    tiny_model(folder)  # writes a tokenizer
    kind(kind.config_class(vocab_size=200, **sizes)).save_pretrained(folder)
    return QRAGModel.from_encoder(folder, device="cpu")


@pytest.mark.parametrize(("kind", "sizes"), [(MPNetModel, _MPNET), (DistilBertModel, _DISTILBERT)])
def test_no_training_moves_what_frozen_layers_give(
    tmp_path: Path, kind: type[PreTrainedModel], sizes: dict[str, int]
) -> None:
    model = of_kind(tmp_path, kind, sizes)
    adapted(model, AdaptConfig(freeze_layers=1, freeze_word_embeddings=False))
    transformer = model.action_encoder.transformer.model

    def hidden() -> list[torch.Tensor]:
        return list(transformer(torch.arange(12)[None], output_hidden_states=True).hidden_states)

    with torch.no_grad():
        before = hidden()
        for weights in transformer.parameters():
            if weights.requires_grad:
                weights.add_(torch.randn_like(weights))
        after = hidden()
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False]


def test_what_cannot_be_computed_again_is_told(tmp_path: Path) -> None:
    model = of_kind(tmp_path, MPNetModel, _MPNET)
    with pytest.raises(ConfigError, match=r"A MPNetModel .*leave --model.adapt.gradient_check"):
        adapted(model, AdaptConfig(gradient_checkpointing=True))


def test_activations_computed_again_give_the_same_gradients(tmp_path: Path) -> None:
    def gradients(again: bool) -> tuple[list[torch.Tensor], int]:
        model = tiny_model(tmp_path / str(again)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            adapted(model, AdaptConfig(gradient_checkpointing=again, dropout=0.0))
        kept: list[torch.Tensor] = []
        encoder = model.action_encoder
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            embed(encoder, model.action_ids(list(COLOURS))).square().sum().backward()
        found = [w.grad for w in encoder.parameters() if w.grad is not None]
        return found, len(kept)

    plain, kept = gradients(again=False)
    again, kept_then = gradients(again=True)
    assert kept_then < kept / 2
    torch.testing.assert_close(again, plain)
