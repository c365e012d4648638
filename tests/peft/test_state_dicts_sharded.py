"""Adapters of models that are sharded over two processes; the programs run in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from .running import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

WAYS = [
    "FSDP 2, units are blocks",
    "FSDP 2, units are blocks and factors",
    "FSDP 1, units are blocks and factors, original parameters",
    "FSDP 1, units are blocks and factors, flat parameters",
    "FSDP 1, one unit",
]


@pytest.mark.costly(cases=0)
def test_adapters_are_trained_saved_and_loaded_whole(tmp_path: Path) -> None:
    assert run("sharded_states", tmp_path, peft=True, links=tmp_path / "links", processes=2) == WAYS


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dora", "lora"])
def test_deepspeed(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="it has no wheels, and needs a compiler")
    done = run("partitioned_states", tmp_path, variant, peft=True, links=tmp_path / "links", processes=2)
    assert done == ["DeepSpeed ZeRO-3"]


def adapters(runs: Path) -> dict[str, dict[str, Tensor]]:
    """Return the adapter that each trainer saved at the end, and its best one, with names as in an unwrapped model."""
    files = {name: runs / f"{name}-saved" / "adapter_model.safetensors" for name in ("Trainer", "SFTTrainer")}
    files |= {f"{name}, best": runs / f"{name}-best.safetensors" for name in files}
    return {
        name: {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(path).items()}
        for name, path in files.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2_parts", "fsdp1_parts"])
@pytest.mark.parametrize("way", ["install_as_peft", "mixin"])
def test_trainers_end_with_the_adapter_of_one_process(
    way: str, mode: str, tiny_model_directory: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    said, saved = {}, {}
    for name, processes in (("one", 1), (mode, 2)):
        runs = tmp_path / name
        runs.mkdir()
        links = tmp_path / f"links-{name}"
        said[name] = run("loops", way, name, tiny_model_directory, runs, peft=True, links=links, processes=processes)
        saved[name] = adapters(runs)
    assert [line.partition(":")[0] for line in said["one"]] == ["Trainer", "SFTTrainer"]
    assert [line.partition(":")[0] for line in said[mode]] == ["Trainer", "SFTTrainer"]
    assert mode != "ddp" or said[mode] == said["one"]  # as many fused modules
    torch.testing.assert_close(saved[mode], saved["one"], rtol=0, atol=1e-5)
