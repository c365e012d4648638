"""State that a block restores: attributes, children, hooks, buffers, forward records, random state; and frozen parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, core
from lorakit.speed import accelerate
from lorakit.speed.probe import eval_mode, frozen, inputs_of, lengths_to_probe, preserved, token_ids, training_mode

from ..small_models import gpt2, llama, t5
from .architectures import architectures, small
from .test_acceleration_every_architecture import changed, held


class Lazy(nn.Module):
    """A module that changes itself in every possible way when called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.inner = nn.Linear(3, 3)
        self.inner.register_forward_hook(lambda *_: None)
        self.seen += 1
        self.register_buffer("cache", x.clone(), persistent=False)
        self.mask = torch.rand(3)
        self.eval()
        made: torch.Tensor = self.inner(x)
        return made


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_as_before(error: type[BaseException] | None) -> None:
    model = nn.Sequential(Lazy(), nn.Dropout())
    before, non_persistent = held(model), set(model[0]._non_persistent_buffers_set)
    try:
        with preserved(model):
            model(torch.ones(2, 3))
            assert {"modules", "attributes", "buffers", "training"} <= set(changed(before, held(model)))
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert not changed(before, held(model))
    assert model[0]._non_persistent_buffers_set == non_persistent


def test_forward_records_are_empty_inside_and_the_same_ones_after() -> None:
    model = llama()
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    layer: Any = model.model.layers[0].self_attn.q_proj
    records = layer.forwards
    with preserved(model):
        assert layer.forwards is not records
    assert layer.forwards is records


def test_parameters_are_frozen_inside_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]


def test_a_model_that_exchanges_its_attention_for_short_rows_keeps_its_own() -> None:
    """BigBird does so permanently the first time it sees a short row, and draws new weights."""
    model = small(*next(one for one in architectures() if one[0] == "big_bird"))
    before = held(model)
    acceleration = accelerate(model)
    assert model.bert.encoder.attention_type == "block_sparse"
    acceleration.undo()
    assert not changed(before, held(model))


def test_what_a_model_caches_in_a_probe_can_be_trained_with() -> None:
    """A table stored outside of every module, as in functions with a cache."""
    model = llama().train()
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    kept: dict[str, torch.Tensor] = {}

    def scaled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * kept.setdefault("scale", torch.full((32,), 2.0))

    model.model.norm.register_forward_hook(scaled)
    accelerate(model).undo()
    assert kept
    ids = torch.arange(18).view(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("tokens", [1, 9, 600])  # 600 random ids contain every id
def test_rows_of_encoder_decoders_contain_the_end_token_once_at_their_end(tokens: int) -> None:
    model = t5()
    ids = token_ids(model, 2, tokens)
    assert ((ids == model.config.eos_token_id).nonzero()[:, 1] == tokens - 1).all()
    assert (ids[:, -1] == model.config.eos_token_id).all() and ids.max() < model.config.vocab_size
    assert torch.equal(inputs_of(model, 2, tokens)["decoder_input_ids"], ids)


@pytest.mark.parametrize("end", [None, -1, 64, [1, 2]])
def test_end_tokens_outside_the_vocabulary_are_not_used(end: Any) -> None:
    model = t5(vocab_size=64)
    model.config.eos_token_id = end
    ids = token_ids(model, 1, 600)
    assert ids.min() >= 0 and ids.max() < 64 and len(ids.unique()) == 64


def test_ids_of_other_models_are_all_random() -> None:
    model = llama()
    assert len(token_ids(model, 1, 900).unique()) == model.config.vocab_size


@pytest.mark.parametrize("name", ["T5ForSequenceClassification", "BartForSequenceClassification"])
def test_encoder_decoders_that_read_their_output_at_the_end_token_run(name: str) -> None:
    model = small(*next(one for one in architectures() if one.name == name))
    with torch.no_grad(), pytest.raises(ValueError, match="eos"):
        model(input_ids=torch.tensor([[5, 6], [5, model.config.eos_token_id]]))
    assert accelerate(model).swaps


def test_lengths_beyond_the_thresholds_of_the_config() -> None:
    model = llama()
    assert lengths_to_probe(model) == (1, 33)
    model.config.sliding_window = 8
    model.config.rope_parameters = {"original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert lengths_to_probe(model) == (1, 33, 9, 65)
    model.config.sliding_window = 4096
    assert lengths_to_probe(model) == (1, 33, 65)


def test_training_mode_without_known_dropout() -> None:
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).eval()
    block = model.transformer.h[0]
    block.extra = nn.Dropout(0.5)
    block.rate = 0.5
    with eval_mode(model):
        with training_mode(model):
            assert block.training and block.extra.p == 0 and block.attn.attn_dropout.p == 0 and block.rate == 0.5
        assert not block.training and block.extra.p == 0.5
    assert not block.training and block.extra.p == 0.5


def test_randomness_in_training_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    from lorakit.identity.identities import Identities
    from lorakit.speed.acceleration import accelerate_known
    from lorakit.speed.admission import Known

    own = LlamaMLP.forward

    def dropping(self: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(own(self, x), 0.5, self.training)

    monkeypatch.setattr(LlamaMLP, "forward", dropping)
    model = llama(use_cache=False).requires_grad_(False)
    identities = Identities()
    for layer in model.model.layers:
        identities.of(layer.mlp).digest, identities.of(layer.mlp).why = "any source", ""
    found = accelerate_known(model, Known(identities, None), logits=True, keep_feed_forward=True)
    assert {name for name, _ in found.swaps} >= {"attention", "norm"}
    assert not {name for name, _ in found.swaps} & {"feed-forward", "decoder layer"}
    assert any("in training mode" in one.why for one in found.skipped)
