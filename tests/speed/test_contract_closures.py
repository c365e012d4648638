"""A fused forward is not used after something that the original refers to in a closure was assigned."""

from __future__ import annotations

import copy
from types import CellType
from typing import Any

import pytest
from torch import Tensor, nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils.deprecation import deprecate_kwarg

from lorakit.identity.identities import Identities, Identity
from lorakit.speed.acceleration import accelerate_known
from lorakit.speed.admission import Known
from lorakit.speed.contract import contract_of_model

from .test_acceleration import adapted
from .test_contract import are_close, results


def other_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    scaled: Tensor = self.weight * hidden_states.tanh()
    return scaled


def wrapped_by_transformers(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> CellType:
    """Wrap a forward in a function of transformers, whose source is available; return the cell of what it wraps."""
    wrapper: Any = deprecate_kwarg("old", version="99.0.0")(kind.forward)
    monkeypatch.setattr(kind, "forward", wrapper)
    cell: CellType = wrapper.__closure__[wrapper.__code__.co_freevars.index("func")]
    return cell


def test_the_cell_of_a_wrapper_assigned_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = wrapped_by_transformers(modeling_qwen3.Qwen3RMSNorm, monkeypatch)
    model = adapted("qwen3")
    plain, own = copy.deepcopy(model), cell.cell_contents
    found = accelerate_known(model, Known(Identities(), None), logits=True, keep_feed_forward=True)
    assert {name for name, _ in found.swaps} >= {"decoder layer", "attention", "norm"}
    usual = results(plain)
    cell.cell_contents = other_norm
    theirs = results(plain)
    assert not are_close(theirs, usual)
    assert are_close(results(model), theirs)
    cell.cell_contents = own
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)  # fused again
    assert are_close(results(model), usual)


def test_the_cell_of_a_wrapper_emptied_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = wrapped_by_transformers(modeling_qwen3.Qwen3RMSNorm, monkeypatch)
    model = adapted("qwen3")
    accelerate_known(model, Known(Identities(), None), logits=True, keep_feed_forward=True)
    del cell.cell_contents
    with pytest.raises(NameError):  # as without acceleration
        results(model)


def test_a_nonlocal_variable_assigned_later() -> None:
    kept = "one"

    def reads() -> str:
        return kept

    def assigns(text: str) -> None:
        nonlocal kept
        kept = text

    contract = contract_of_model(nn.Module(), [Identity(live=[reads])], [])
    assert contract.holds()
    assigns("two")
    assert not contract.holds()
    assigns("one")
    assert contract.holds()


def test_functions_without_a_closure_have_nothing_to_compare() -> None:
    contract = contract_of_model(nn.Module(), [Identity(live=[modeling_qwen3.rotate_half])], [])
    assert contract.functions and not contract.cells
