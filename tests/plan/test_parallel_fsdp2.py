"""FSDP2 shards and gathers what the plan counts: one of eight processes runs, on torch's fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import core, hub
from lorakit.config import LoraConfig
from lorakit.plan import Cluster, Job, estimate
from lorakit.plan.parallel import FSDP, parts_of_base, rank_plan

distributed = pytest.importorskip("torch.distributed")
fsdp = pytest.importorskip("torch.distributed.fsdp")
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

PROCESSES = 8
CONFIG = LoraConfig(r=4, target_modules="all-linear")


class Gathers(TorchDispatchMode):
    """Bytes that this process's all-gathers send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.__name__:
            _, part, *_ = args
            self.sent += (PROCESSES - 1) * part.numel() * part.element_size()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def group() -> Iterator[Any]:
    distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=PROCESSES)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    finally:
        distributed.destroy_process_group()


def sharded(model: Any, blocks: Any, mesh: Any) -> None:
    """Shard the frozen parameters, block by block, then the others."""
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for block in blocks:
        fsdp.fully_shard(block, mesh=mesh, ignored_params=trained)
    fsdp.fully_shard(model, mesh=mesh, ignored_params=trained)


def local_bytes(model: nn.Module) -> int:
    parts = [p.to_local() for p in model.parameters() if hasattr(p, "to_local")]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}.values())


@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_shards_and_all_gathers(name: str, recompute: str, group: Any, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name).train()
    shape = hub.shape_of_module(model, "tiny", "a test")
    plan = estimate(shape, CONFIG, Job(2, 16, accumulation=2, recompute=recompute, dtype="float32"))
    core.attach(model, CONFIG)
    if recompute == "layers":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    sharded(model, model.model.layers if name == "tiny_llama" else model.transformer.h, group)
    assert local_bytes(model) == sum(parts_of_base(shape, 4, PROCESSES).values())
    with Gathers() as counted:
        for _ in range(2):
            ids = torch.randint(0, shape.vocab, (2, 16))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counted.sent == rank_plan(plan, Cluster(PROCESSES), FSDP).traffic.gathered_bytes
