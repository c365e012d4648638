"""lorakit.core.model.index: how often each public call walks the model, and what an index holds after `put`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.kinds import PARAMETER, parameter_spec
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.named_layers import layer_class
from lorakit.core.model.activation import set_trained
from lorakit.core.model.index import AdapterIndex, TargetWeight, find_state
from lorakit.core.model.vocabulary import grow_vocabulary
from lorakit.core.routing.state import AdapterState
from lorakit.errors import AdapterError

BLOCKS = 3


class Block(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(self.up(x)))


class Model(nn.Module):
    """An embedding, blocks, and a head that is not tied."""

    def __init__(self, rows: int = 16) -> None:
        super().__init__()
        self.head = nn.Linear(8, rows, bias=False)
        self.embed = nn.Embedding(rows, 8)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Listed(dict[str, Any]):
    """A module's table of children that counts how often they are listed."""

    def __init__(self, children: dict[str, Any]) -> None:
        super().__init__(children)
        self.count = 0

    def items(self) -> Any:
        self.count += 1
        return super().items()

    def values(self) -> Any:
        self.count += 1
        return super().values()


@contextlib.contextmanager
def walks(model: nn.Module) -> Iterator[list[int]]:
    """Count complete walks, however they are written: each one lists the children of the last block."""
    block = model.get_submodule(f"layers.{BLOCKS - 1}")
    children = block._modules
    listed = block.__dict__["_modules"] = Listed(children)
    counts: list[int] = []
    try:
        yield counts
    finally:
        counts.append(listed.count)
        children.clear()
        children.update(dict.items(listed))
        block.__dict__["_modules"] = children


def made() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["up", "down"], "init_lora_weights": False, **more})


CONFIGS = {
    "plain": config(),
    "all-linear": config(target_modules="all-linear"),
    "dora": config(use_dora=True),
    "pissa": config(init_lora_weights="pissa"),
    "biases": config(bias="all"),
    "saved modules": config(modules_to_save=["head", "norm"]),
    "trained tokens": config(trainable_token_indices={"embed": [1, 2]}),
    "bare parameters": config(target_modules=[], target_parameters=["head.weight"]),
}


def adapted(folder: Path | None = None, asked: LoraConfig | None = None) -> Model:
    model = made()
    core.attach(model, config() if asked is None else asked, "a")
    if folder is not None:
        core.save_adapter(model, folder, "a")
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_attach_save_detach_and_load_walk_once(name: str, tmp_path: Path) -> None:
    model = made()
    steps: dict[str, Callable[[], Any]] = {
        "attach": lambda: core.attach(model, CONFIGS[name], "a"),
        "save": lambda: core.save_adapter(model, tmp_path, "a"),
        "detach": lambda: core.detach(model, "a"),
        "load": lambda: core.load_adapter(model, tmp_path, "a"),
        "attach a second": lambda: core.attach(model, config(), "b") if name != "bare parameters" else None,
        "load a second": lambda: core.load_adapter(model, tmp_path, "c") if name != "biases" else None,
    }
    counted = {}
    for step, call in steps.items():
        with walks(model) as counts:
            call()
        counted[step] = counts[0]
    assert counted.pop("attach a second") <= 1
    assert counted.pop("load a second") <= 1
    assert counted == {"attach": 1, "save": 1, "detach": 1, "load": 1}


CALLS: dict[str, tuple[Callable[[nn.Module], Any], int]] = {
    "use": (lambda model: used(model), 0),
    "route": (lambda model: core.route(model, ["a", None]), 0),
    "disable": (core.disable, 0),
    "activate": (lambda model: core.activate(model, "a"), 0),
    "adapters": (core.adapters, 0),
    "checkpoint_contexts": (core.checkpoint_contexts, 0),
    "set_trained": (lambda model: set_trained(model, {"a": False}), 0),
    "trainable_parameters": (core.trainable_parameters, 1),  # torch's own, for the names
    "sites": (core.sites, 1),
    "fingerprint": (core.fingerprint, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_on_an_adapted_model(name: str) -> None:
    model = adapted()
    call, expected = CALLS[name]
    with walks(model) as counts:
        call(model)
    assert counts == [expected]


def used(model: nn.Module) -> None:
    with core.use(model, "a"):
        model(torch.tensor([[1, 2]]))


MERGES: dict[str, Callable[[nn.Module], Any]] = {
    "merge": lambda model: core.merge(model, "a"),
    "unmerge": lambda model: core.unmerge(model),
    "detach of a merged adapter": lambda model: core.detach(model, "a"),
    "merged_state_dict": lambda model: core.merged_state_dict(model, "a"),
    "merge_and_unload": lambda model: core.merge_and_unload(model, "a"),
}


@pytest.mark.parametrize("name", MERGES)
def test_merges_walk_once(name: str) -> None:
    model = adapted()
    if name in ("unmerge", "detach of a merged adapter"):
        core.merge(model, "a")
    with walks(model) as counts:
        MERGES[name](model)
    assert counts == [1]


def test_a_load_that_appends_rows_walks_twice(tmp_path: Path) -> None:
    grown = made()
    grow_vocabulary(grown, 18)
    core.attach(grown, config(trainable_token_indices={"embed": [16, 17], "head": [16, 17]}), "a")
    core.save_adapter(grown, tmp_path, "a")
    model = made()
    with walks(model) as counts, pytest.warns(UserWarning, match="rows were appended"):
        core.load_adapter(model, tmp_path, "a")
    assert model.embed.weight.shape[0] == 18
    assert counts == [2]


def test_stacked_layers_are_walked_again() -> None:
    model = made()
    core.attach(model, config(layer_replication=[(0, 2), (1, 3)]), "a")
    assert len(model.layers) == 4
    assert len(dict(AdapterIndex.of(model).layers())) == 8


def test_the_count_sees_every_kind_of_walk() -> None:
    model = adapted()
    for walk in (
        lambda: list(model.modules()),
        lambda: list(model.named_parameters()),
        lambda: model.state_dict(),
        lambda: model.train(),
        lambda: AdapterIndex.of(model),
    ):
        with walks(model) as counts:
            walk()
        assert counts[0] >= 1


def test_an_index_of_an_index_is_itself() -> None:
    index = AdapterIndex.of(made())
    assert AdapterIndex.of(index) is index


def test_what_an_index_holds() -> None:
    model = adapted(asked=config(target_modules=["up"], modules_to_save=["head"], bias="lora_only"))
    index = AdapterIndex.of(model)
    assert index.state is find_state(model)
    assert list(index.components) == ["head", *(f"layers.{n}.up" for n in range(BLOCKS))]
    assert [path for path, _ in index.layers("a")] == [f"layers.{n}.up" for n in range(BLOCKS)]
    assert [path for path, _ in index.layers("b")] == []
    assert [path for path, _ in index.every(ModulesToSave)] == ["head"]
    assert list(index.patches) == [f"layers.{n}.up.base_layer" for n in range(BLOCKS)]
    assert "head.original_module" in index.everything
    assert "head.original_module" not in index.modules
    assert "" in index.everything
    assert "" not in index.modules
    assert index.parents[id(model.head)] == [(model, "head")]


def test_shared_weights_have_all_their_holders() -> None:
    model = made()
    model.head.weight = model.embed.weight
    index = AdapterIndex.of(model)
    names = [name for holders in index.holders.values() if len(holders) > 1 for name, _ in holders]
    assert names == ["head.weight", "embed.weight"]
    assert index.names_elsewhere(model.embed.weight, {id(model.embed)}) == ["head.weight"]


def test_a_module_in_two_places_is_listed_once_and_has_two_parents() -> None:
    model = made()
    model.layers[1] = model.layers[0]
    index = AdapterIndex.of(model)
    assert "layers.0.up" in index.modules
    assert "layers.1.up" not in index.modules
    assert index.parents[id(model.layers[0])] == [(model.layers, "0"), (model.layers, "1")]
    assert [path for path, _ in index.plain_modules() if path.endswith(".up")] == [f"layers.{n}.up" for n in range(3)]
    core.attach(model, config(target_modules=["up"]), "a")
    assert model.layers[0].up is model.layers[1].up


class Pair(nn.Module):
    """Two bare matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))


def test_what_is_put_is_in_the_index() -> None:
    model = nn.Sequential(Pair())
    index, state = AdapterIndex.of(model), AdapterState()
    for name in ("second", "first"):
        target = TargetWeight("0", "0", PARAMETER, parameter_spec(index.base("0"), name))
        index.put(target, lambda module, spec=target.spec: layer_class(PARAMETER)(module, PARAMETER, spec, state))
    assert [(path, layer.spec.parameter) for path, layer in index.layers()] == [
        ("0", "second"),
        ("0.base_layer", "first"),
    ]
    assert model[0] is index.components["0"] is index.modules["0"]


def test_adapters_of_parts_are_told_apart() -> None:
    model = made()
    core.attach(model.layers[0], config(), "a")
    core.attach(model.layers[1], config(), "a")
    with pytest.raises(AdapterError, match="adapted separately") as found:
        AdapterIndex.of(model)
    assert "layers.0.up" in str(found.value)
    assert "layers.1.up" in str(found.value)
