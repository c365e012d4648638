"""Law 11: only an explicit merge changes a byte of the base; `detach` restores trained biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core import (
    activate,
    adapters,
    attach,
    detach,
    disable,
    fingerprint,
    load_adapter,
    merged_state_dict,
    route,
    save_adapter,
    use,
)
from lorakit.core.inits import init_named

from .snapshots import BaseBits, bits
from .tolerances import assert_differs
from .zoo import (
    ARCHITECTURES,
    BERT,
    EVERY_KIND,
    EXPERTS,
    MHA,
    TIED,
    Case,
    Specimen,
    attach_fresh,
    base_tensors,
    cases,
    output,
    run,
    with_adapters,
)


def train(model: nn.Module, specimen: Specimen, dtype: torch.dtype = torch.float32, steps: int = 2) -> None:
    """Take optimizer steps over all parameters with a gradient, with weight decay; a trainable base parameter would change."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)  # with 0.1, CorDA overflows in fp16
    for _ in range(steps):
        optimizer.zero_grad()
        output(model, specimen.given(dtype)).float().pow(2).mean().backward()
        optimizer.step()
    model.eval()


def live(
    model: nn.Module, specimen: Specimen, folder: Path, dtype: torch.dtype = torch.float32, reload: bool = True
) -> None:
    """Do everything with an adapted model that users do, except merging."""
    given = specimen.given(dtype)
    train(model, specimen, dtype)
    for mode in (True, False):
        model.train(mode)
        run(model, given)
    names = ["a", "b"]
    activate(model, "b")
    train(model, specimen, dtype)
    with use(model, *names):
        train(model, specimen, dtype)
    with disable(model):
        run(model, given)
    if specimen not in (MHA, EXPERTS):
        with route(model, ["a", None, "b", "a"]):
            run(model, given)
    if adapters(model)["a"].alora_invocation_tokens is None:
        merged_state_dict(model, "a", "b")
    save_adapter(model, folder, "a")
    if reload:
        load_adapter(model, folder, "c", allow=())
    with use(model, "c" if reload else "a"):
        run(model, given)


@pytest.mark.parametrize("case", cases())
def test_a_life_with_adapters(case: Case, tmp_path: Path) -> None:
    model = case.specimen.model(case.dtype)
    base, mark = BaseBits(model), fingerprint(model)
    init = init_named(case.init)
    drops = {"lora_dropout": 0.0 if case.kind == "Parameter" else 0.1}  # a bare parameter's input is never shown
    attach_fresh(model, case.specimen, "a", case.dtype, **{**drops, **case.fields})
    plain = {"init_lora_weights": True} if init.changes_base else {}
    attach_fresh(model, case.specimen, "b", case.dtype, **{**drops, **case.fields, **plain})
    moved = {name: bits(tensor) for name, tensor in base_tensors(model).items()}
    assert (moved == base.before) is not case.moves_base
    live(model, case.specimen, tmp_path, case.dtype, reload=case.init != "loftq")
    assert base.changed() == [name for name in base.before if moved[name] != base.before[name]]
    assert {name: bits(tensor) for name, tensor in base_tensors(model).items()} == moved
    assert fingerprint(model) == mark
    detach(model)
    assert BaseBits(model).before == base.before
    assert [(n, id(t)) for n, t in BaseBits(model).tensors] == [(n, id(t)) for n, t in base.tensors]


@pytest.mark.parametrize("specimen", [*ARCHITECTURES, TIED], ids=str)
def test_architectures(specimen: Specimen, tmp_path: Path) -> None:
    model = specimen.model()
    base = BaseBits(model)
    for name in ("a", "b"):
        attach(model, specimen.config(), name)
    live(model, specimen, tmp_path)
    assert base.changed() == []
    detach(model)
    assert BaseBits(model).before == base.before


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["classifier"]},
        {"bias": "all", "modules_to_save": ["classifier"]},
    ],
    ids=str,
)
def test_trained_biases_and_copies_come_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model, given = BERT.model(), BERT.given()
    base, before, mark = BaseBits(model), run(BERT.model(), given), fingerprint(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attach(model, BERT.config(**fields), "a")
    attach(model, BERT.config(), "b")
    train(model, BERT, steps=4)
    assert_differs(run(model, given), before, torch.float32)
    assert fingerprint(model) == mark
    with disable(model):
        assert bits(run(model, given)) == bits(before)
    with use(model, "b"):
        run(model, given)
    save_adapter(model, tmp_path, "a")
    detach(model, "a")
    with disable(model):
        assert bits(run(model, given)) == bits(before)
    detach(model, "b")
    assert BaseBits(model).before == base.before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert bits(run(model, given)) == bits(before)


def test_only_the_adapters_own_numbers_require_gradients() -> None:
    model = EVERY_KIND.model()
    attach(model, EVERY_KIND.config())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)


def test_requires_grad_flags_come_back_as_they_were() -> None:
    model = EVERY_KIND.model()
    model.embed.weight.requires_grad_(False)
    attach(model, EVERY_KIND.config(), "a")
    attach(model, EVERY_KIND.config(), "b")
    detach(model, "a")
    assert not model.linear.base_layer.weight.requires_grad
    detach(model, "b")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "embed.weight": False, "conv.weight": True, "conv.bias": True, "linear.weight": True, "linear.bias": True,
    }  # fmt: skip


def test_adapters_that_come_and_go_leave_the_module_tree_as_it_was() -> None:
    model = BERT.model()
    tree = [(name, id(module)) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    for fields in ({}, {"bias": "all"}, {"modules_to_save": ["classifier", "pooler"]}):
        attach(model, BERT.config(**fields), "a")
        attach(model, BERT.config(), "b")
        detach(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == tree
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_the_last_detach_of_a_merged_adapter_restores_the_bits() -> None:
    from lorakit.core import merge

    model = with_adapters(EVERY_KIND, "a", "b", dtype=torch.bfloat16)
    plain = BaseBits(EVERY_KIND.model(torch.bfloat16)).before
    merge(model, "a", "b")
    detach(model, "a")
    detach(model, "b")
    assert BaseBits(model).before == plain
