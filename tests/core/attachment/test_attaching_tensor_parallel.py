"""A weight that is distributed over processes cannot be adapted: a clear error, and nothing has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.errors import NotYetSupported


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Return a mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


CONFIG = LoraConfig(target_modules=["0", "1"], r=2)


def refused(model: nn.Module, folder: Path) -> NotYetSupported:
    """Return the error of `attach`, after checking that `load_adapter` raises one too and that nothing has changed."""
    saved = base()
    core.attach(saved, CONFIG)
    core.save_adapter(saved, folder)
    with pytest.raises(NotYetSupported):
        core.load_adapter(model, folder)
    with pytest.raises(NotYetSupported, match="distributed over processes") as caught:
        core.attach(model, CONFIG)
    assert all(type(module) is nn.Linear for module in model)
    return caught.value


def test_a_dtensor(mesh: DeviceMesh, tmp_path: Path) -> None:
    model = base()
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Shard(0)]))
    error = refused(model, tmp_path)
    assert (error.what, error.where, error.field) == ("DTensor", "1", "target_modules")
    core.attach(model, CONFIG.with_fields(target_modules=["0"]))


def test_a_plan_of_earlier_releases(tmp_path: Path) -> None:
    model = base()
    model[0]._hf_tp_plan = "colwise"
    error = refused(model, tmp_path)
    assert (error.what, error.where, error.field) == ("colwise", "0", "target_modules")
