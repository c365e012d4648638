"""lorakit.train.processes.sharding: how processes share a base, which units are sharded, and what works afterwards."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core, plan
from lorakit.config import LoraConfig
from lorakit.core.clones import has_observers, own_class
from lorakit.core.model.index import AdapterIndex
from lorakit.data import Batch
from lorakit.errors import MergeError, NotYetSupported, UsageError
from lorakit.session.measuring import IDLE
from lorakit.tasks import CAUSAL_LM
from lorakit.tasks.embedding import EMBEDDING
from lorakit.train.loop.loop import own_batches
from lorakit.train.loop.step import idle_batches
from lorakit.train.processes.processes import ALONE, Processes
from lorakit.train.processes.sharding import Parallel, blocks_of, shard_base
from lorakit.train.setup import agreement
from lorakit.train.setup.agreement import choose_parallel, obstacle

from ... import small_models

CPU = torch.device("cpu")
ONE = Parallel("fsdp", (1,), CPU, "asked")

needs_groups = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def spec(parallel: str = "fsdp", config: LoraConfig | None = None, **words: Any) -> Any:
    """Return an object with the fields that are read of a run's specification."""
    made = {
        "settings": SimpleNamespace(parallel=parallel, fit=None),
        "forecast": SimpleNamespace(config=config or LoraConfig()),
        "processes": ALONE,
        "quantization": None,
        "base_matmul": "dtype",
        "task": SimpleNamespace(task=CAUSAL_LM),
        "device": CPU,
    }
    return SimpleNamespace(**{**made, **words})


class Told(Processes):
    """Processes with these local ranks; this is the first one."""

    def exchange(self, value: Any) -> list[Any]:
        return [0, 1] * (self.count // 2) if isinstance(value, int) else [value] * self.count


def test_how_processes_share_a_base() -> None:
    plan: Any = None
    assert choose_parallel(spec(), plan) is None  # one process
    four = Told(0, 4)
    assert choose_parallel(spec("fsdp", processes=four), plan).shape == (4,)
    hybrid = choose_parallel(spec("hsdp", processes=four), plan)
    assert (hybrid.method, hybrid.shape) == ("hsdp", (2, 2))
    one = choose_parallel(spec("hsdp", processes=Told(0, 2)), plan)
    assert (one.method, one.shape) == ("fsdp", (2,))
    assert choose_parallel(spec("auto", processes=four), plan).method == "ddp"  # on a CPU


@pytest.mark.parametrize("ranks", [[0, 0], [0, 1, 0], [0, 1, 1, 0]])
def test_machines_with_unequal_processes(ranks: list[int]) -> None:
    with pytest.raises(UsageError) as found:
        agreement._hybrid(ranks, CPU, "asked")
    assert (found.value.field, found.value.what) == ("parallel", str(tuple(ranks)))


def test_auto_shards_what_does_not_fit_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = plan.catalogue.published("llama-3.2-1b")
    assert shape is not None
    estimated = plan.estimate(shape, LoraConfig(target_modules="all-linear"))
    needed = {rank.way: rank.needed_bytes for rank in plan.choose_parallel(estimated, plan.Cluster(4, 2)).ranks}
    gpu = torch.device("cuda", 0)
    for way, room in needed.items():
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, room=room: SimpleNamespace(total_memory=room)
        )
        found = choose_parallel(spec("auto", processes=Told(0, 4), device=gpu), estimated)
        assert (found.method, found.device) == (way, gpu)
    quantized = spec("auto", processes=Told(0, 4), device=gpu, quantization=SimpleNamespace(name="nf4"))
    assert choose_parallel(quantized, estimated).method == "ddp"


@needs_groups
def test_what_prevents_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import fsdp

    assert obstacle(spec()) is None
    cases = {
        "quantization": spec(quantization=SimpleNamespace(name="nf4")),
        "layer_replication": spec(config=LoraConfig(layer_replication=[(0, 2), (1, 2)])),
        "task": spec(task=SimpleNamespace(task=EMBEDDING)),
        "fit": spec(settings=SimpleNamespace(parallel="fsdp", fit="8GB")),
    }
    for name, one in cases.items():
        found = obstacle(one)
        assert isinstance(found, NotYetSupported)
        assert found.field == name
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, mesh=None: module)  # as in torch 2.6
    old = obstacle(spec())
    assert isinstance(old, UsageError)
    assert old.what == torch.__version__


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("t5", [f"{side}.block.{number}" for side in ("encoder", "decoder") for number in range(2)]),
    ],
)
def test_blocks(family: str, blocks: list[str]) -> None:
    assert blocks_of(AdapterIndex.of(getattr(small_models, family)())) == blocks


@needs_groups
def test_bases_that_cannot_be_divided(alone: None) -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    core.attach(plain, LoraConfig(r=2, target_modules="all-linear"), "default")
    with pytest.raises(NotYetSupported) as found:
        shard_base(plain, ONE)
    assert found.value.what == "Sequential"
    model = small_models.llama()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"]), "default")
    with pytest.raises(NotYetSupported) as found:
        shard_base(model, ONE)
    assert found.value.where == "model.layers.1.mlp.up_proj"
    assert type(model) is own_class(model)


@needs_groups
def test_a_sharded_model(alone: None) -> None:
    model = small_models.llama()
    kind = type(model)
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "default")
    trained = {name: (p.shape, p.dtype) for name, p in core.trainable_parameters(model, "default")}
    made = shard_base(model, ONE)
    assert (made.blocks, made.local_bytes) == (2, made.whole_bytes)
    assert {name: (p.shape, p.dtype) for name, p in core.trainable_parameters(model, "default")} == trained
    assert own_class(model) is kind is not type(model)
    layers = model.model.layers
    assert not has_observers(layers[0])
    with layers[0].register_forward_hook(lambda *_: None):
        assert has_observers(layers[0])
    with pytest.raises(MergeError) as found:
        core.merge(model, "default")
    assert found.value.what == "DTensor"
    with pytest.raises(MergeError):
        layers[0].self_attn.q_proj.original()  # it would be as large as the whole weight
    with pytest.raises(NotYetSupported):
        core.attach(model, LoraConfig(r=2, target_modules=["k_proj"]), "other")


def batch(tokens: int) -> Batch:
    ids = torch.ones(1, tokens, dtype=torch.long)
    return Batch(ids, ids, ids, 0.0, tokens, tokens)


def test_processes_in_lockstep_take_equally_many_batches() -> None:
    mine = [batch(5), batch(3)]
    first = Told(0, 2, in_lockstep=True)
    assert idle_batches(first, mine, [2, 2]) == []
    assert idle_batches(replace(first, in_lockstep=False), mine, [2, 3]) == []
    assert [one.tokens for one in idle_batches(first, mine, [2, 4])] == [3, 3]
    with_none = Received(1, 2, in_lockstep=True)
    assert [one.tokens for one in idle_batches(with_none, [], [1, 0])] == [7]


class Received(Processes):
    """Processes whose first one sends a batch."""

    def exchange(self, value: Any) -> list[Any]:
        return [[batch(7)], value]


class Quiet(Processes):
    """Processes that do not ask to stop."""

    def any(self, flag: bool) -> bool:
        return flag


@pytest.mark.parametrize("count", [4, 5])
def test_processes_in_lockstep_evaluate_equally_often(count: int) -> None:
    batches = [batch(number + 1) for number in range(count)]
    taken = [list(own_batches(batches, Quiet(rank, 2, in_lockstep=True))) for rank in range(2)]
    numbers = [[number for number, _ in one] for one in taken]
    assert numbers == ([[0, 2], [1, 3]] if count == 4 else [[0, 2, 4], [1, 3, IDLE]])
    apart = [list(own_batches(batches, Quiet(rank, 2))) for rank in range(2)]
    assert [number for number, _ in apart[1]] == [1, 3]
    stops = iter([False, True])
    stopped = list(own_batches(batches, Quiet(1, 2, in_lockstep=True), lambda: next(stops)))
    assert stopped[-1] == (2, None)  # before the second batch of both processes
