"""The sweep over architectures finds differences, and says where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import tensor

from .architectures import Architecture, small_settings
from .sweep import CALLS, RUNS, Subject, Sweep, answer, differences, kept, wrong
from .sweep_changes import SOME, changed_fields, changes_afterwards, check_fields

pytestmark = pytest.mark.filterwarnings("ignore")
MISTRAL = Architecture("mistral", "MistralForCausalLM")
GEMMA = Architecture("gemma2", "Gemma2ForCausalLM")


class OneFieldLost(Sweep):
    """A sweep whose accelerated model is built without a change of one field, as if a fused forward ignored it."""

    lost = "sliding_window"

    def fast(self, settings: Any = None, dtype: torch.dtype = torch.float32) -> Subject:
        given = {**(settings or self.settings), self.lost: self.settings.get(self.lost)}
        return super().fast(given, dtype)


@pytest.mark.costly(cases=0)
def test_a_field_that_is_ignored_is_found() -> None:
    sweep = OneFieldLost(MISTRAL, small_settings(*MISTRAL))
    check_fields(sweep)
    assert sweep.failures and all(one.startswith("sliding_window=") for one in sweep.failures)


def test_a_call_that_raises_is_found() -> None:
    sweep = Sweep(MISTRAL, small_settings(*MISTRAL))
    run = RUNS["no mask"]
    wanted = run(sweep.plain())

    def fails(one: Subject) -> dict[str, torch.Tensor]:
        raise KeyError("x")

    assert "KeyError" in wrong(fails, sweep.fast(), wanted)[0]


def test_calls_that_the_plain_model_rejects_are_counted() -> None:
    sweep = Sweep(MISTRAL, small_settings(*MISTRAL))
    found = sweep.results(sweep.plain(), {"too many": lambda one: one.model(**one.call(one.ids()), x=1, input_ids=1)})
    assert not found and sweep.rejected == 1


def test_fields_that_change_the_arithmetic_are_covered() -> None:
    names = {name.partition("=")[0] for name, _ in changed_fields(Sweep(GEMMA, small_settings(*GEMMA)))}
    wanted = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"}
    assert wanted | {"rms_norm_eps", "hidden_activation", "rope_parameters", "layer_types", "head_dim"} <= names
    assert not names & {"vocab_size", "initializer_range", "pad_token_id", "model_type", "num_hidden_layers"}


@pytest.mark.parametrize("architecture", [MISTRAL, GEMMA], ids=lambda one: one.kind)
def test_changes_afterwards_are_reverted(architecture: Architecture) -> None:
    plain = Sweep(architecture, small_settings(*architecture)).plain()
    call = CALLS["left padding"](plain)
    before = answer(plain, call)
    changed = 0
    for _, change in changes_afterwards(plain.model):
        try:
            with change(plain.model):
                changed += bool(differences(answer(plain, call), before, 0.0))
        except Exception:  # noqa: BLE001 - the model rejects the change
            continue
    assert changed > 5
    assert not differences(answer(plain, call), before, 0.0)


def test_parameters_that_start_as_constants_differ() -> None:
    model = Sweep(GEMMA, small_settings(*GEMMA)).plain().model
    assert all(len(parameter.unique()) > 1 for parameter in model.parameters() if parameter.numel() > 1)


def test_differences_of_results() -> None:
    one = {"loss": tensor(1.0), "logits": tensor([1.0, float("nan")])}
    assert not differences(one, one, 1e-4)
    assert not differences({"loss": tensor(1.0)}, one, 1e-4)  # a loss without logits
    assert differences(one | {"loss": tensor(1.1)}, one, 1e-4) == ["loss: 1.0e-01"]
    assert "logits" in differences(one | {"logits": tensor([1.0, 2.0])}, one, 1e-4)[0]
    assert "shape" in differences(one | {"logits": tensor([1.0])}, one, 1e-4)[0]
    assert differences(one | {"gradient of a": tensor([1.0])}, one, 1e-4)


def test_padding_is_not_compared() -> None:
    output = torch.arange(12.0).view(2, 3, 2)
    mask = tensor([[1, 1, 0], [1, 1, 1]])
    assert kept(output, mask).shape == (5, 2)
    assert kept(output[:, 0], mask).shape == (2, 2)


def test_the_loss_alone_has_other_gradients() -> None:
    sweep = Sweep(MISTRAL, small_settings(*MISTRAL))
    run = SOME["no mask"]
    both, alone = run(sweep.plain()), run(replace(sweep, logits=False).plain())
    assert torch.equal(both["logits"], alone["logits"])
    assert differences(alone, both, 1e-4)
