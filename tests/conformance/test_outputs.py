"""The same names in memory, trained parameters, outputs and gradients in both libraries."""

from __future__ import annotations

import pytest
import torch

from .architectures import loss_of, model_named, outputs_of
from .closeness import assert_close, assert_differs
from .rows import ROWS_COMPARED, Row


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_same_names_and_shapes_in_memory(row: Row) -> None:
    peft_model, our_model = row.pair()
    assert _shapes(our_model) == _shapes(peft_model)
    assert type(our_model).__name__ == type(peft_model).__name__
    assert our_model.get_nb_trainable_parameters() == peft_model.get_nb_trainable_parameters()


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_same_parameters_are_trained(row: Row) -> None:
    peft_model, our_model = row.pair()
    assert _trained(our_model) == _trained(peft_model)


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_same_outputs_and_gradients(row: Row) -> None:
    peft_model, our_model = row.pair()
    expected, found = peft_model(**row.inputs), our_model(**row.inputs)
    assert_close(outputs_of(found), outputs_of(expected))
    assert_differs(outputs_of(found), outputs_of(model_named(row.model)(**row.inputs)))
    loss_of(expected).backward()
    loss_of(found).backward()
    assert_close(_gradients(our_model), _gradients(peft_model), rtol=3e-5)


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
