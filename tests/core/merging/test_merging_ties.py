"""Merges of weights that are shared, untied or moved into other modules: what changes, and what is restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import LoraConfig
from lorakit.core import (
    attach,
    detach,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.errors import MergeError

from ...laws.snapshots import bits, snapshot
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import LINEARS, TIED, randomise, run

FP32 = torch.float32
GIVEN = TIED.given()
TARGETED = {"target_modules": ["embed_tokens"]}


class Shared(nn.Module):
    """An embedding and a head over one weight, `between` a dense layer."""

    def __init__(self, by_storage: bool = False) -> None:
        super().__init__()
        self.emb, self.between, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = nn.Parameter(self.emb.weight.data) if by_storage else self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self.emb(x)))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def config(*targets: str, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": list(targets), **fields})


def shared(adapters: dict[str, LoraConfig], by_storage: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Shared(by_storage)
    for seed, (name, wanted) in enumerate(adapters.items()):
        attach(model, wanted, name)
        randomise(model, name, seed + 1)
    return model


def state_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_untie_where_nothing_is_shared_gives_the_bits_back(init: Any, order: tuple[str, str]) -> None:
    model = LINEARS.model()
    plain, weight = state_bits(model), model.up.weight
    attach(model, LINEARS.config(init_lora_weights=init), "a")
    attach(model, LINEARS.config(), "b")
    for seed, name in enumerate(("a", "b")):
        randomise(model, name, seed)
    merge(model, order[0])
    merge(model, order[1], untie=True)
    assert model.up.owner.weight is weight
    unmerge(model)
    detach(model)
    assert state_bits(model) == plain
    assert model.up.weight is weight


@pytest.mark.parametrize("keep_base", [True, "cpu"])
@pytest.mark.parametrize("by_storage", [False, True])
def test_what_was_untied_is_one_again(keep_base: Any, by_storage: bool) -> None:
    wanted = {"a": config("emb"), "b": config("head"), "c": config("emb", "head")}
    model = shared(wanted, by_storage)
    plain = state_bits(shared({}, by_storage))
    outputs = {}
    for name in wanted:
        with use(model, name):
            outputs[name] = run(model, IDS)
    with pytest.raises(MergeError, match=r"emb shares its weight with head"):
        merge(model, "a")
    merge(model, "a", untie=True, keep_base=keep_base)
    merge(model, "b", keep_base=keep_base)
    unmerge(model, "a")
    with use(model, "b"):
        assert_close(run(model, IDS), outputs["b"], FP32)
    merge(model, "c", untie=True, keep_base=keep_base)
    unmerge(model, "b")
    with use(model, "c"):
        assert_close(run(model, IDS), outputs["c"], FP32)
    unmerge(model, "c")
    detach(model)
    assert state_bits(model) == plain
    assert model.head.weight.data_ptr() == model.emb.weight.data_ptr()
    assert by_storage or model.head.weight is model.emb.weight


def test_what_is_set_aside_is_no_parameter() -> None:
    model = shared({"a": config("emb")})
    before = list(model.state_dict())
    merge(model, "a", untie=True)
    assert list(model.state_dict()) == before
    model = shared({"a": config("between", trainable_token_indices={"emb": [1, 2]})})
    before = list(model.state_dict())
    merge(model, "a", untie=True)
    assert list(model.state_dict()) == before


def test_what_comes_back_is_where_the_model_is() -> None:
    model = shared({"a": config("emb", "head")})
    merge(model, "a", untie=True)
    model.double()
    unmerge(model, "a")
    detach(model)
    assert model.emb.weight.dtype == torch.float64 and model.emb.weight is model.head.weight
    assert torch.equal(model.emb.weight, shared({}).double().emb.weight)


def test_one_led_and_one_that_is_not() -> None:
    model = shared({"p": config("emb"), "q": config("emb", ensure_weight_tying=True)})
    with use(model, "p", "q"):
        wanted = run(model, IDS)
    before = snapshot(model)
    for call in (merge, merge_and_unload):
        with pytest.raises(MergeError, match="shares its weight with head"):
            call(model, "p", "q")
        assert snapshot(model) == before
    tensors = merged_state_dict(model, "p", "q")
    assert not torch.equal(tensors["emb.weight"], tensors["head.weight"])
    merge(model, "p", "q", untie=True)
    assert_close(run(model, IDS), wanted, FP32)
    unmerge(model)
    detach(model)
    assert model.emb.weight is model.head.weight


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.many = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.many(self.one(x))


@pytest.mark.parametrize("keep_base", [True, False])
def test_untie_and_dense_at_once(keep_base: bool) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    attach(model, config("one", "many"), "a")
    randomise(model, "a", 1)
    x = torch.randn(2, 4, 8)
    wanted = run(model, x)
    if keep_base:
        merge(model, "a", untie=True, dense=True)
    else:
        merge_and_unload(model, "a", untie=True, dense=True)
    assert_close(run(model, x), wanted, FP32)


def test_two_copies_of_one_module() -> None:
    fields = {"modules_to_save": ["between"]}
    model = shared({"a": config("head", **fields), "b": config("head", **fields)})
    model.head.base_layer.weight = nn.Parameter(model.head.base_layer.weight.detach().clone())
    before = snapshot(model)
    text = r"a and b each have their own copy of between \(modules_to_save\)"
    for call in (merge, merge_and_unload, merged_state_dict):
        with pytest.raises(MergeError, match=text):
            call(model, "a", "b")
        assert snapshot(model) == before
    merge(model, "a")
    with pytest.raises(MergeError, match=text):
        merge(model, "b")
    unmerge(model, "a")
    merge(model, "b")


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (Shared, {"target_modules": ["emb"]}),
        (lambda: Shared(True), {"trainable_token_indices": {"emb": [1]}}),
        (Convolutions, {"target_modules": ["many", "one"]}),
    ],
    ids=["factors", "rows", "dense"],
)
@pytest.mark.parametrize("first", [False, True])
def test_what_was_trainable_is_so_again(make: Callable[[], nn.Module], targets: dict[str, Any], first: bool) -> None:
    model = make()
    model.between = nn.Linear(6, 6)
    model.between.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    attach(model, LoraConfig(**{"r": 2, "target_modules": ["between"], **targets}), "a")
    attach(model, LoraConfig(r=2, target_modules=["between"]), "b")
    if first:
        merge(model, "a", untie=True, dense=True)
        merge_and_unload(model, "b", untie=True, dense=True)
    else:
        merge_and_unload(model, "a", untie=True, dense=True)
    assert {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)} == flags


@pytest.mark.parametrize("untie", [False, True])
def test_rows_are_written_into_memory_of_their_own(untie: bool) -> None:
    model = shared({"a": config("between", trainable_token_indices={"emb": [1, 2]})}, by_storage=True)
    rows = dict(trainable_parameters(model, "a"))["emb.token_adapter.trainable_tokens_delta.a"]
    with torch.no_grad():
        rows.add_(1)
    base, wanted = bits(model.head.weight), run(model, IDS)
    if not untie:
        before = snapshot(model)
        with pytest.raises(MergeError, match=r"emb shares its weight with head.weight.*untie=True"):
            merge(model, "a")
        assert snapshot(model) == before
        return
    merge(model, "a", untie=True)
    assert bits(model.head.weight) == base
    assert_close(run(model, IDS), wanted, FP32)
    unmerge(model, "a")
    assert_close(run(model, IDS), wanted, FP32)
    detach(model)
    assert bits(model.emb.weight) == base and model.emb.weight.data_ptr() == model.head.weight.data_ptr()


def test_a_view_from_before_a_merge_of_rows_keeps_its_numbers() -> None:
    model = shared({"a": config("between", trainable_token_indices={"emb": [1, 2]})})
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    seen = model.emb.token_adapter.base_layer.weight.detach()
    before = bits(seen)
    with torch.no_grad():
        model.emb.token_adapter.trainable_tokens_delta["a"].add_(1)
    merge(model, "a")
    assert bits(seen) == before
    assert_differs(model.emb.token_adapter.base_layer.weight.detach(), seen, FP32)
    unmerge(model, "a")
    assert bits(model.emb.token_adapter.base_layer.weight) == before


def test_tables_that_follow_are_untied_with_their_leader() -> None:
    model = shared({"a": config("between", trainable_token_indices={"emb": [1]})})
    model.third = nn.Linear(6, 10, bias=False)  # it comes when the rows are there, so it does not follow them
    model.third.weight = model.emb.token_adapter.base_layer.weight
    with torch.no_grad():
        model.emb.token_adapter.trainable_tokens_delta["a"].add_(1)
    wanted, base = run(model, IDS), bits(model.third.weight)
    merge(model, "a", untie=True)
    assert_close(run(model, IDS), wanted, FP32)
    unmerge(model, "a")
    detach(model)
    assert model.emb.weight is model.head.weight is model.third.weight and bits(model.emb.weight) == base


def test_tied_factors_of_which_one_is_never_trained(tmp_path: Path) -> None:
    made = config("emb", ensure_weight_tying=True, init_lora_weights="mica")
    save_adapter(shared({"a": made}), tmp_path, "a")
    model = shared({})
    load_adapter(model, tmp_path, "a", trainable=True)
    trained = [name for name, p in trainable_parameters(model, "a") if p.requires_grad]
    assert len(trained) == 1


@pytest.mark.parametrize("order", [("emb", "head"), ("head", "emb")])
def test_tied_layers_unmerged_one_by_one_in_either_order(order: tuple[str, str]) -> None:
    model = shared({"x": config("emb", "head", ensure_weight_tying=True)})
    expected, before = model(IDS), bits(model.emb.weight)
    merge(model, "x")
    for name in order:
        model.get_submodule(name).unmerge()
    assert [model.get_submodule(name).merged_adapters for name in order] == [[], []]
    assert bits(model.emb.weight) == before == bits(model.head.weight)
    assert torch.equal(model(IDS), expected)
