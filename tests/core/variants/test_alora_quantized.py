"""aLoRA on quantized bases: the formula, the base before the start, gradients, files and caches."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.core import attach, disable, load_adapter, merge, route, save_adapter, trainable_parameters, use
from lorakit.errors import MergeError
from lorakit.plan.quantized import Storage

from ...laws.quantized import packed_bits, storages, stored_linear
from ...laws.snapshots import same_bits
from ...laws.tolerances import assert_close
from ...laws.zoo import INVOCATION, Specimen, randomise, run

EVERY = pytest.mark.parametrize("storage", storages())
FP32 = torch.float32
START = 2  # position of the invocation in each row


def _given(rows: int) -> Tensor:
    ids = torch.randint(INVOCATION[-1] + 1, 50, (rows, 7), generator=torch.Generator().manual_seed(8))
    ids[:, START : START + len(INVOCATION)] = torch.tensor(INVOCATION)
    return ids


def specimen(storage: Storage) -> Specimen:
    """An embedding, two quantized layers and a head; positions do not interact."""

    def make() -> nn.Module:
        up, square = nn.Linear(64, 128), nn.Linear(128, 128, bias=False)
        made = [stored_linear(up, storage), nn.Tanh(), stored_linear(square, storage)]
        names = ("up", "act", "square")
        return nn.Sequential(
            OrderedDict(embed=nn.Embedding(50, 64), **dict(zip(names, made, strict=True)), out=nn.Linear(128, 7))
        )

    return Specimen(storage.name, make, ("up", "square"), _given)


def waiting(kind: Specimen, *names: str) -> nn.Module:
    model = kind.model()
    for seed, name in enumerate(names or ("a",)):
        attach(model, kind.config(alora_invocation_tokens=list(INVOCATION), task_type="CAUSAL_LM"), name)
        randomise(model, name, 40 + seed)
    return model


@EVERY
def test_before_the_start_it_is_the_base_and_after_it_plain_lora(storage: Storage) -> None:
    kind = specimen(storage)
    model, ids = waiting(kind), kind.given()
    base = run(kind.model(), ids)
    plain = kind.model()
    attach(plain, kind.config(), "a")
    randomise(plain, "a", 40)
    found = run(model, ids)
    assert_close(found[:, :START], base[:, :START], FP32)
    assert_close(found[:, START:], run(plain, ids)[:, START:], FP32)
    assert not torch.allclose(found[:, START:], base[:, START:])
    with disable(model):
        assert same_bits(run(model, ids), base)


@EVERY
def test_gradients_come_from_what_follows_the_start_alone_and_the_base_stays(storage: Storage) -> None:
    kind = specimen(storage)
    model, ids = waiting(kind), kind.given()
    before = packed_bits(model)
    for training in (False, True):
        model.train(training).zero_grad()
        model(ids)[:, :START].square().sum().backward()
        assert not any(p.grad is not None and bool(p.grad.any()) for _, p in trainable_parameters(model))
        model(ids)[:, START:].square().sum().backward()
        assert all(bool(p.grad.any()) for _, p in trainable_parameters(model))
    assert packed_bits(model) == before


@EVERY
def test_in_a_mixed_batch_and_through_a_plain_merge(storage: Storage) -> None:
    kind = specimen(storage)
    model, ids = waiting(kind, "a", "b"), kind.given()
    attach(model, kind.config(), "plain")
    randomise(model, "plain", 77)
    alone = {None: run(kind.model(), ids)}
    for name in ("a", "b", "plain"):
        with use(model, name):
            alone[name] = run(model, ids)
    for merged in (False, True):
        if merged:
            merge(model, "plain", dense=True)
        rows = ["a", None, "plain", "b"]
        with route(model, rows):
            mixed = run(model, ids)
        for index, name in enumerate(rows):
            assert_close(mixed[index], alone[name][index], FP32)


@EVERY
def test_saved_and_loaded_and_never_merged(storage: Storage, tmp_path: Path) -> None:
    kind = specimen(storage)
    model, ids = waiting(kind), kind.given()
    save_adapter(model, tmp_path, "a")
    again = kind.model()
    load_adapter(again, tmp_path)
    assert same_bits(run(again, ids), run(model, ids))
    before = packed_bits(model)
    for dense in (False, True):
        with pytest.raises(MergeError, match=r"Adapter 'a' at up is aLoRA, which cannot be merged"):
            merge(model, "a", dense=dense)
    assert packed_bits(model) == before


@pytest.mark.costly
@EVERY
@torch.no_grad()
def test_compiled(storage: Storage) -> None:
    kind = specimen(storage)
    model = waiting(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for ids in (kind.given(), kind.given().roll(1, 1)):
        assert_close(compiled(ids), model(ids), FP32)
    torch._dynamo.reset()
