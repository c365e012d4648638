"""Law 12: a call that fails changes nothing: no byte, module, flag, name or file, and no other adapter's output."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.config import LoraConfig
from lorakit.config.nested import EvaConfig
from lorakit.core import (
    activate,
    attach,
    checkpoint_contexts,
    detach,
    disable,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    route,
    save_adapter,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.errors import (
    AdapterError,
    ConfigError,
    DiskError,
    LorakitError,
    MergeError,
    RouteError,
    TargetError,
)

from .snapshots import bits, files, snapshot
from .tolerances import assert_close
from .zoo import BERT, EVERY_KIND, TIED, output, run, with_adapters

Call = Callable[[nn.Module], object]


def answers(model: nn.Module, specimen: Any) -> list[str]:
    """Return the bits of the outputs of every adapter, of both together, and of the base."""
    found = []
    for block in (
        use(model, "a"),
        use(model, "b"),
        use(model, "a", "b"),
        disable(model),
        route(model, ["a", None, "b", "b"]),
    ):
        with block:
            found.append(bits(run(model, specimen.given())))
    found.append(bits(run(model, specimen.given())))
    return found


def refused(model: nn.Module, specimen: Any, call: Call, error: type[BaseException], text: str) -> None:
    """Check that the call raises and changes nothing."""
    before, said = snapshot(model), answers(model, specimen)
    with pytest.raises(error, match=text):
        call(model)
    assert snapshot(model) == before
    assert answers(model, specimen) == said


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **fields})


ATTACH: dict[str, tuple[LoraConfig, str, type[LorakitError], str]] = {
    "nothing": (config(target_modules=["nope"]), "new", TargetError, "'nope'"),
    "partly": (config(target_modules=["query", "valeu"]), "new", TargetError, "'valeu'.*nearest: value"),
    "regex-nothing": (config(target_modules=r".*\.nope"), "new", TargetError, "nope"),
    "bad-regex": (config(target_modules="(query"), "new", ConfigError, "target_modules.*regular expression"),
    "bad-pattern": (config(rank_pattern={"(query": 2}), "new", ConfigError, "regular expression"),
    "container": (config(target_modules=["query", "attention"]), "new", TargetError, "BertAttention.*does not support"),
    "norm": (config(target_modules=["query", "LayerNorm"]), "new", TargetError, "LayerNorm.*does not support"),
    "excluded": (config(exclude_modules=["querry"]), "new", TargetError, "exclude_modules.*'querry'"),
    "idle-pattern": (config(rank_pattern={"nope": 2}), "new", TargetError, "rank_pattern.*'nope'"),
    "save-nothing": (config(modules_to_save=["clasifier"]), "new", TargetError, "modules_to_save.*'clasifier'.*classifier"),
    "layers": (config(layers_to_transform=[7]), "new", TargetError, "query"),
    "alpha-0": (config(lora_alpha=0), "new", ConfigError, "scale at .*query is 0"),
    "alpha-negative": (config(lora_alpha=-8), "new", ConfigError, "scale at .* is -2"),
    "alpha-huge": (config(alpha_pattern={"value": 1e9}), "new", ConfigError, "scale at .*value"),
    "taken": (config(), "a", AdapterError, "already has an adapter 'a'"),
    "dot": (config(), "a.b", AdapterError, "'a.b'.*no dot"),
    "empty": (config(), "", AdapterError, "''"),
    "slash": (config(), "../x", AdapterError, "'../x'"),
    "keys": (config(), "keys", AdapterError, "'keys'"),
    "train": (config(), "train", AdapterError, "'train'"),
    "type": (config(), "type", AdapterError, "'type'"),
    "eva without data": (BERT.config(init_lora_weights="eva", eva_config=EvaConfig()), "new", ConfigError, "needs data"),
    "init": (config(init_lora_weights="gausian"), "new", ConfigError, "'gausian'.*gaussian"),
    "second-bias": (config(bias="all"), "new", ConfigError, "bias"),
}  # fmt: skip


@pytest.mark.parametrize("which", ATTACH)
def test_attach(which: str) -> None:
    given, name, error, text = ATTACH[which]
    model = with_adapters(BERT, "a", bias="lora_only")
    attach(model, BERT.config(), "b")
    before = given.to_dict()
    refused(model, BERT, lambda m: attach(m, given, name), error, text)
    assert given.to_dict() == before
    plain = BERT.model()
    if which not in {"taken", "second-bias"}:
        tree, flags = snapshot(plain), [p.requires_grad for p in plain.parameters()]
        with pytest.raises(error, match=text):
            attach(plain, given, name)
        assert snapshot(plain) == tree and [p.requires_grad for p in plain.parameters()] == flags


def test_attach_without_targets() -> None:
    model = with_adapters(EVERY_KIND, "a", "b")
    refused(model, EVERY_KIND, lambda m: attach(m, LoraConfig(), "new"), ConfigError, "Please specify `target_modules`")
    refused(
        model,
        EVERY_KIND,
        lambda m: attach(m, config(), "new", allow=["partial"]),
        ConfigError,
        "allow contains 'partial'",
    )


CALLS: dict[str, tuple[Call, type[LorakitError], str]] = {
    "detach": (lambda m: detach(m, "nope"), AdapterError, "'nope' not found.*a, b"),
    "activate": (lambda m: activate(m, "a", "nope"), RouteError, "Adapter 'nope' not found on this model.*a, b"),
    "use": (lambda m: use(m, "nope"), RouteError, "Adapter 'nope' not found on this model.*a, b"),
    "use-none": (lambda m: use(m), RouteError, "at least one adapter"),
    "route": (lambda m: route(m, ["a", "nope"]), RouteError, "Adapter 'nope' not found"),
    "route-none": (lambda m: route(m, []), RouteError, "row"),
    "route-string": (lambda m: route(m, "ab"), RouteError, "list"),
    "merge": (lambda m: merge(m, "a", "nope"), AdapterError, "'nope' not found"),
    "merged_state_dict": (lambda m: merged_state_dict(m, "nope"), AdapterError, "'nope' not found"),
    "merge_and_unload": (lambda m: merge_and_unload(m, "nope"), AdapterError, "'nope' not found"),
    "unmerge": (lambda m: unmerge(m, "a"), MergeError, "'a' is not merged"),
    "unmerge-unknown": (lambda m: unmerge(m, "nope"), LorakitError, "'nope'"),
    "trainable": (lambda m: trainable_parameters(m, "nope"), AdapterError, "'nope' not found"),
    "load-taken": (lambda m: load_adapter(m, "no/such/folder", "a"), AdapterError, "already has an adapter 'a'"),
    "load-nothing": (lambda m: load_adapter(m, "no/such/folder", "new"), LorakitError, "no/such/folder"),
}


@pytest.mark.parametrize("which", CALLS)
def test_calls(which: str) -> None:
    call, error, text = CALLS[which]
    refused(with_adapters(EVERY_KIND, "a", "b"), EVERY_KIND, call, error, text)


ON_PLAIN: dict[str, Call] = {
    "detach": detach,
    "activate": lambda m: activate(m, "a"),
    "use": lambda m: use(m, "a"),
    "route": lambda m: route(m, ["a"]),
    "disable": disable,
    "merge": merge,
    "unmerge": unmerge,
    "merge_and_unload": merge_and_unload,
    "merged_state_dict": merged_state_dict,
    "trainable_parameters": trainable_parameters,
    "checkpoint_contexts": checkpoint_contexts,
    "save": lambda m: save_adapter(m, "never-made"),
}


@pytest.mark.parametrize("which", ON_PLAIN)
def test_a_model_without_adapters(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = EVERY_KIND.model()
    before = snapshot(model)
    with pytest.raises(AdapterError, match="has no adapters"):
        ON_PLAIN[which](model)
    assert snapshot(model) == before
    assert files(tmp_path) == {} and not (tmp_path / "never-made").exists()


@pytest.mark.parametrize("rows", [["a"], ["a", None, "b"], ["a"] * 5])
def test_a_route_that_does_not_fit_the_batch(rows: list[str | None]) -> None:
    def call(model: nn.Module) -> None:
        with route(model, rows):
            output(model, EVERY_KIND.given())

    refused(
        with_adapters(EVERY_KIND, "a", "b"),
        EVERY_KIND,
        call,
        RouteError,
        rf"rows in the route \({len(rows)}\) .*rows: 4",
    )


def test_a_block_left_by_an_exception() -> None:
    for block in (use, route, disable):
        arguments: tuple[Any, ...] = {"use": ("b",), "route": (["b"] * 4,), "disable": ()}[block.__name__]

        def call(model: nn.Module, block: Any = block, arguments: tuple[Any, ...] = arguments) -> None:
            with use(model, "a", "b"), block(model, *arguments):
                output(model, EVERY_KIND.given())
                raise KeyError("mine")

        refused(with_adapters(EVERY_KIND, "a", "b"), EVERY_KIND, call, KeyError, "mine")


def test_merge_twice_and_merge_of_nothing() -> None:
    model = with_adapters(EVERY_KIND, "a", "b")
    activate(model)
    refused(model, EVERY_KIND, merge, MergeError, "No adapter is active")
    activate(model, "a")
    merge(model, "a")
    refused(model, EVERY_KIND, lambda m: merge(m, "a"), MergeError, "'a' is already merged")
    refused(model, EVERY_KIND, lambda m: merge(m, "b", "a"), MergeError, "'a' is already merged")


def test_merge_into_a_tied_weight() -> None:
    model = with_adapters(TIED, "a", "b", target_modules=["q_proj", "embed_tokens"])
    for call in (merge, merge_and_unload, lambda m: merge(m, "b", keep_base=False)):
        refused(model, TIED, call, MergeError, "embed_tokens shares its weight with lm_head")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_merge_that_is_not_finite(value: float) -> None:
    model = with_adapters(EVERY_KIND, "a", "b")
    with torch.no_grad():
        dict(trainable_parameters(model, "b"))["linear.lora_B.b.weight"].fill_(value)
    before = snapshot(model)
    for call in (lambda: merge(model, "b"), lambda: merge(model, "a", "b"), lambda: merge_and_unload(model, "b")):
        with pytest.raises(MergeError, match="linear gives NaN or infinite weights"):
            call()
        assert snapshot(model) == before


def test_save_of_numbers_that_are_not_finite(tmp_path: Path) -> None:
    model = with_adapters(EVERY_KIND, "a", "b")
    save_adapter(model, tmp_path, "a")
    before = files(tmp_path)
    with torch.no_grad():
        dict(trainable_parameters(model, "b"))["linear.lora_B.b.weight"][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"linear\.lora_B"):
        save_adapter(model, tmp_path, "b")
    assert files(tmp_path) == before
    save_adapter(model, tmp_path, "b", allow=["nonfinite"])


class FailAt(TorchDispatchMode):
    """Make the k-th operation of torch fail, as it does when memory runs out."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("injected")
        return function(*args, **(kwargs or {}))


def _saved_y(folder: Path) -> Path:
    save_adapter(with_adapters(EVERY_KIND, "x", "y", bias="none"), folder, "y")
    return folder


STEPS: dict[str, Call] = {
    "attach": lambda m: attach(m, EVERY_KIND.config(), "new"),
    "attach-copies": lambda m: attach(m, LoraConfig(target_modules=["embed", "conv"], modules_to_save=["linear"]), "new"),
    "attach-bias": lambda m: attach(m, EVERY_KIND.config(bias="all"), "new"),
    "attach-dora": lambda m: attach(m, EVERY_KIND.config(target_modules=["conv", "linear"], use_dora=True), "new"),
    "merge": lambda m: merge(m, "a", "b"),
    "merge-cpu": lambda m: merge(m, "a", keep_base="cpu"),
    "merged-state-dict": lambda m: merged_state_dict(m, "a", "b"),
    "detach": lambda m: detach(m, "a"),
    "detach-all": lambda m: detach(m),
}  # fmt: skip


def fails_at_every_operation(make: Callable[[], nn.Module], call: Call) -> int:
    """Make the call fail at its first operation, its second, … until it succeeds; check each time that nothing changed."""
    model = make()
    before = snapshot(model)
    for k in itertools.count(1):
        try:
            with FailAt(k):
                call(model)
        except MemoryError:
            assert snapshot(model) == before, f"changed by a failure at operation {k}"
        else:
            return k - 1
    raise AssertionError


@pytest.mark.parametrize("which", STEPS)
def test_torch_fails_at_every_operation(which: str) -> None:
    targets = ["embed", "conv"] if which == "attach-copies" else list(EVERY_KIND.targets)
    count = fails_at_every_operation(lambda: with_adapters(EVERY_KIND, "a", "b", target_modules=targets), STEPS[which])
    assert count >= (0 if which.startswith("detach") else 3)


@pytest.mark.parametrize(
    "call", [lambda m: merge(m, "a", keep_base=False), lambda m: merge_and_unload(m, "a")], ids=["merge", "unload"]
)
def test_a_merge_that_keeps_nothing_fails_half_way(call: Call) -> None:
    """It streams, so written data cannot be undone; still nothing is lost and nothing is counted twice."""
    specimen = EVERY_KIND
    half_way = 0
    for k in itertools.count(1):
        model = with_adapters(specimen, "a", "b")
        before, expected = snapshot(model), run(model, specimen.given())
        try:
            with FailAt(k):
                call(model)
        except MemoryError:
            assert_close(run(model, specimen.given()), expected, torch.float32)
            half_way += snapshot(model) != before
        else:
            break
    assert 0 < half_way < k / 2, "the first half only looks"


def test_torch_fails_at_every_operation_of_a_load(tmp_path: Path) -> None:
    folder = _saved_y(tmp_path)
    assert (
        fails_at_every_operation(lambda: with_adapters(EVERY_KIND, "a", "b"), lambda m: load_adapter(m, folder, "new"))
        >= 3
    )
    assert fails_at_every_operation(EVERY_KIND.model, lambda m: load_adapter(m, folder, "new")) >= 3


def test_torch_fails_at_every_operation_of_unmerge() -> None:
    def merged() -> nn.Module:
        model = with_adapters(EVERY_KIND, "a", "b")
        merge(model, "a", "b")
        return model

    fails_at_every_operation(merged, lambda m: unmerge(m, "a"))
    fails_at_every_operation(merged, unmerge)


@pytest.mark.parametrize("function", ["fsync", "replace", "rename", "mkdir", "open"])
def test_the_disk_refuses_a_save(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call of a file operation, counted: the old adapter still loads, or the new one does; never a mixture."""
    model = with_adapters(EVERY_KIND, "a", "b")
    expected = {}
    for name in ("a", "b"):
        with use(model, name):
            expected[name] = bits(run(model, EVERY_KIND.given()))
    before = snapshot(model)
    real = getattr(os, function)
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        save_adapter(model, folder, "a")
        calls = itertools.count(1)

        def failing(*args: Any, _calls: Any = calls, _k: int = k, **kwargs: Any) -> Any:
            if next(_calls) == _k:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, function, failing)
        try:
            save_adapter(model, folder, "b")
        except DiskError as error:
            assert "No space left" in str(error) and str(folder) in str(error)
            done = False
        else:
            done = True
        finally:
            monkeypatch.setattr(os, function, real)
        assert snapshot(model) == before
        fresh = EVERY_KIND.model()
        load_adapter(fresh, folder, "x")
        found = bits(run(fresh, EVERY_KIND.given()))
        assert found == expected["b"] if done else found in expected.values()
        assert not [name for name in files(folder) if "tmp" in name]
        if done:
            break


def test_tensors_are_compared_by_every_bit() -> None:
    """A snapshot detects a single changed bit, a flag and a mode."""
    model = with_adapters(EVERY_KIND, "a")
    before = snapshot(model)
    weight: Tensor = model.linear.base_layer.weight.data
    weight.view(torch.int32)[0, 0] ^= 1
    assert snapshot(model) != before
    weight.view(torch.int32)[0, 0] ^= 1
    assert snapshot(model) == before
    model.linear.base_layer.bias.requires_grad_(True)
    assert snapshot(model) != before
