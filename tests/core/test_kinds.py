"""The table KINDS: which modules it finds, shapes of A and B, and the two half-products beside the dense delta."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorakit.core.kinds import KINDS, dense_delta, kind_named, kind_of


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


def test_a_weight_that_its_owner_reads_itself_is_refused() -> None:
    assert kind_of(type(nn.MultiheadAttention(4, 2).out_proj)) is None


@pytest.mark.parametrize("name", MODULES)
def test_every_kind_gives_linear_orientation(name: str) -> None:
    kind = kind_named(name)
    (slot,) = kind.slots(MODULES[name])
    assert (slot.out_features, slot.in_features) == (3, 5)
    assert kind.shapes(slot, 2) == ((2, 5), (3, 2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_half_products_are_the_dense_delta(kind) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    A, B, module = torch.randn(2, 5), torch.randn(3, 2), MODULES[kind.name]
    x = torch.randint(0, 5, (4, 6)) if kind.name == "Embedding" else torch.randn(4, 6, 5)
    one_hot = F.one_hot(x, 5).float() if kind.name == "Embedding" else x
    found = kind.up(module, kind.down(module, x, A), B)
    torch.testing.assert_close(found, one_hot @ dense_delta(A, B).T)


def test_only_an_embedding_begins_with_a_zero_A() -> None:
    assert {kind.name: kind.zero_side for kind in KINDS} == {"Linear": "B", "Conv1D": "B", "Embedding": "A"}


def test_a_scaled_embedding_scales_its_delta() -> None:
    module = nn.Embedding(5, 3)
    module.embed_scale = 4.0  # type: ignore[assignment]
    kind, A, B = kind_named("Embedding"), torch.randn(2, 5), torch.randn(3, 2)
    x = torch.tensor([1, 3])
    torch.testing.assert_close(kind.up(module, kind.down(module, x, A), B), 4 * dense_delta(A, B).T[x])
