"""The registry KINDS: module types, shapes of A and B, and A and B applied separately against the dense delta."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorakit import choices
from lorakit.config import LoraConfig
from lorakit.core import attach
from lorakit.core.kinds import (
    INNER,
    KINDS,
    Kind,
    checked,
    fits,
    kind_named,
    kind_of,
    parameter_spec,
)
from lorakit.core.kinds.kind import dense_delta, every_kind, every_kind_of_the_table
from lorakit.errors import ConfigError, MergeError, TargetError


class OwnLinear(nn.Linear):
    """A user's subclass."""


MODULES = {"Linear": nn.Linear(5, 3), "Conv1D": Conv1D(3, 5), "Embedding": nn.Embedding(5, 3)}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_found_by_its_type(name: str) -> None:
    assert kind_of(type(MODULES[name])) is kind_named(name)


def test_a_subclass_is_its_ancestors_kind() -> None:
    assert kind_of(OwnLinear) is kind_named("Linear")


@pytest.mark.parametrize("module_type", [nn.LayerNorm, nn.Dropout, nn.Sequential])
def test_other_modules_are_none(module_type: type[nn.Module]) -> None:
    assert kind_of(module_type) is None


def test_a_weight_that_its_owner_reads_has_a_kind_of_its_own() -> None:
    assert kind_of(type(nn.MultiheadAttention(4, 2).out_proj)) is INNER


@pytest.mark.parametrize("name", MODULES)
def test_every_kind_gives_linear_orientation(name: str) -> None:
    kind = kind_named(name)
    (spec,) = kind.specs(MODULES[name])
    assert (spec.out_features, spec.in_features) == (3, 5)
    assert kind.shapes(spec, 2) == ((2, 5), (3, 2))


@pytest.mark.parametrize("name", MODULES)
def test_the_half_products_are_the_dense_delta(name: str) -> None:
    torch.manual_seed(0)
    kind, module, A, B = kind_named(name), MODULES[name], torch.randn(2, 5), torch.randn(3, 2)
    x = torch.randint(0, 5, (4, 6)) if kind.name == "Embedding" else torch.randn(4, 6, 5)
    one_hot = F.one_hot(x, 5).float() if kind.name == "Embedding" else x
    found = kind.up(module, kind.down(module, x, A), B)
    torch.testing.assert_close(found, one_hot @ dense_delta(A, B).T)


def test_only_an_embedding_begins_with_a_zero_A() -> None:
    assert {kind.name for kind in KINDS if kind.zero_side == "A"} == {"Embedding"}


def test_a_scaled_embedding_scales_its_delta() -> None:
    module = nn.Embedding(5, 3)
    module.embed_scale = 4.0  # type: ignore[assignment]
    kind, A, B = kind_named("Embedding"), torch.randn(2, 5), torch.randn(3, 2)
    x = torch.tensor([1, 3])
    torch.testing.assert_close(kind.up(module, kind.down(module, x, A), B), 4 * dense_delta(A, B).T[x])


CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
AROUND = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect", "dilation": 2},
    {"padding": 1, "groups": 2},
]


@pytest.mark.parametrize("around", AROUND, ids=str)
@pytest.mark.parametrize("make", CONVOLUTIONS, ids=lambda make: make.__name__)
def test_a_convolutions_half_products_are_the_convolution_with_its_delta(
    make: type[nn.Conv2d], around: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    dims = CONVOLUTIONS.index(make) + 1
    module = make(4, 6, 3, bias=False, **around)
    kind, (spec,) = kind_of(make), kind_of(make).specs(module)  # type: ignore[union-attr]
    A_shape, B_shape = kind.shapes(spec, 2)  # type: ignore[union-attr]
    A, B = torch.randn(A_shape), torch.randn(B_shape)
    x = torch.randn(2, 4, *[8] * dims)
    found = kind.up(module, kind.down(module, x, A), B)  # type: ignore[union-attr]
    whole = make(4, 6, 3, bias=False, **{**around, "groups": 1})
    flat_A, flat_B = kind.flat(spec, A, B)  # type: ignore[union-attr]
    whole.weight.data = (flat_B @ flat_A).view(whole.weight.shape)
    torch.testing.assert_close(found, whole(x), rtol=1e-4, atol=1e-4)
    if spec.groups == 1:
        torch.testing.assert_close(kind.delta(spec, A, B), whole.weight.data)  # type: ignore[union-attr]
    else:
        with pytest.raises(MergeError, match="a convolution with 2 groups cannot store"):
            kind.delta(spec, A, B)  # type: ignore[union-attr]
        wide = make(4, 6, 3, bias=False, **{**around, "groups": 1})
        wide.weight.data = kind.flat_weight(spec, module.weight.data).view(wide.weight.shape)  # type: ignore[union-attr]
        torch.testing.assert_close(module(x), wide(x), rtol=1e-4, atol=1e-4)


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    kind = kind_named("Conv2d")
    (spec,) = kind.specs(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(ConfigError, match="rank is 3, but a convolution with 2 groups needs a rank divisible by 2"):
        kind.shapes(spec, 3)


@pytest.mark.parametrize("in_first", [False, True])
def test_experts_share_a_and_b_as_peft_lays_them(in_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.stack = nn.Parameter(torch.zeros((2, 5, 3) if in_first else (2, 3, 5)))
    module.is_transposed = in_first  # type: ignore[assignment]
    spec, kind = parameter_spec(module, "stack"), kind_named("Parameter")
    assert kind.shapes(spec, 4) == ((8, 5), (3, 8))
    A, B = torch.randn(8, 5), torch.randn(3, 8)
    delta = kind.delta(spec, A, B)
    for expert in range(2):
        one = B[:, expert::2] @ A[4 * expert : 4 * expert + 4]
        torch.testing.assert_close(delta[expert], one.T if in_first else one)


def test_a_parameter_of_one_axis_is_refused() -> None:
    with pytest.raises(
        TargetError, match=r"'weight' has shape \(4,\); LoRA requires a parameter with two or three axes"
    ):
        parameter_spec(nn.LayerNorm(4), "weight")


@pytest.mark.parametrize("more", [{}, {"padding_idx": 2}], ids=str)
@pytest.mark.parametrize(
    "fields", [{"target_modules": ["table"]}, {"trainable_token_indices": {"table": [1, 2]}}], ids=str
)
def test_an_embedding_with_sparse_gradients_trains_as_one_without(more: dict[str, Any], fields: dict[str, Any]) -> None:
    x, found = torch.tensor([[1, 2, 2, 3]]), []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"table": nn.Embedding(10, 8, sparse=sparse, **more), "other": nn.Linear(8, 8)})
        attach(model, LoraConfig(**{"r": 2, "target_modules": ["other"], "init_lora_weights": False, **fields}), seed=1)
        model["other"](model["table"](x)).pow(2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    plain, sparse_one = found
    assert plain.keys() == sparse_one.keys() and len(plain) >= 2
    assert all(torch.equal(plain[name], sparse_one[name]) for name in plain)


def test_a_users_kind_has_nothing_that_only_our_module_types_have() -> None:
    class Own(nn.Linear):
        pass

    linear, inner = kind_named("Linear"), kind_named("InnerLinear")
    assert linear.is_dense and inner.read_by_owner and kind_named("Parameter").names_parameter
    for like in (linear, inner, kind_named("Parameter")):
        own = checked([dataclasses.replace(like, name="Own", types=(Own,))])["Own"]
        assert not (own.is_dense or own.names_parameter or own.read_by_owner)
        assert fits(every_kind, own) and not fits(every_kind_of_the_table, own)
    assert kind_of(nn.modules.linear.NonDynamicallyQuantizableLinear) is inner


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_names_of_layer_types_are_those_of_kinds(kind: Kind) -> None:
    named = {value for value in vars(choices).values() if isinstance(value, str)}
    assert kind.name in named | set(choices.CONVOLUTIONS)
    assert kind.is_dense is (kind.name in choices.DENSE)
    assert kind.names_parameter is (kind.name == choices.PARAMETER)
