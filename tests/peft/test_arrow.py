"""`create_arrow_model`: names, arguments and errors; a failed call leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config.nested import ArrowConfig
from lorakit.errors import AdapterFileError, ConfigError, ConfigTypeError, LorakitError
from lorakit.peft import create_arrow_model
from lorakit.peft.arrow import source_of

from ..laws.snapshots import snapshot
from ..laws.zoo import CONV2, LINEARS, Specimen, randomise, run

Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Function that saves an adapter and returns its folder."""

    def saved(name: str, specimen: Specimen = LINEARS, **fields: Any) -> str:
        model = specimen.model()
        core.attach(model, specimen.config(**fields), name)
        randomise(model, name, seed=sum(map(ord, name)))
        core.save_adapter(model, tmp_path / name, name)
        return str(tmp_path / name)

    return saved


def test_names_and_what_is_active_and_trained(save: Save) -> None:
    config = ArrowConfig(top_k=2, use_gks=True)
    model = create_arrow_model(LINEARS.model(), [save("a"), save("b")], config, [save("c")])
    assert list(model.peft_config) == ["task_0", "task_1", "gks_0", "arrow_router"]
    assert model.active_adapters == ["arrow_router"]
    router = model.peft_config["arrow_router"]
    assert router.r == 4 and router.target_modules == {"up", "square"}
    for one in (config, router.arrow_config):
        assert one is not None and (one.task_adapter_names, one.gks_adapter_names) == (["task_0", "task_1"], ["gks_0"])
    assert {name for name, _ in model.named_parameters() if _.requires_grad} == {
        f"base_model.model.{path}.lora_{side}.arrow_router.weight" for path in ("up", "square") for side in "AB"
    }
    general = create_arrow_model(LINEARS.model(), [save("a"), save("b")], ArrowConfig(top_k=2), [save("c")])
    assert list(general.peft_config) == ["task_0", "task_1", "arrow_router"]  # as in peft, they are not loaded


def test_one_expert_with_top_k_of_one_is_that_expert(save: Save) -> None:
    model = create_arrow_model(LINEARS.model(), [save("a")], ArrowConfig(top_k=1)).eval()
    given = LINEARS.given()
    found = run(model, given)
    model.set_adapter("task_0")
    torch.testing.assert_close(found, run(model, given))


def refused(kind: type[LorakitError], field: str | None, *args: Any, base: nn.Module | None = None) -> LorakitError:
    """Return the error of a call, after checking that the model did not change."""
    model = LINEARS.model() if base is None else base
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        create_arrow_model(model, *args)
    assert caught.value.field == field
    assert snapshot(model) == before
    return caught.value


def test_arguments_are_checked_before_anything_changes(save: Save) -> None:
    a, b, one = save("a"), save("b"), ArrowConfig(top_k=1)
    refused(ConfigError, "task_specific_adapter_paths", [], one)
    refused(ConfigError, "task_specific_adapter_paths", None, one)
    refused(ConfigTypeError, "task_specific_adapter_paths", a, one)
    refused(ConfigTypeError, "arrow_config", [a], {"top_k": 1})
    refused(ConfigError, "general_adapter_paths", [a], ArrowConfig(top_k=1, use_gks=True))
    refused(ConfigError, "top_k", [a, b], ArrowConfig(top_k=3))
    adapted = LINEARS.model()
    core.attach(adapted, LINEARS.config(), "old")
    refused(ConfigError, "base_model", [a], one, base=adapted)


def test_adapters_that_differ_are_named(save: Save) -> None:
    two = ArrowConfig(top_k=2)
    assert refused(ConfigError, "r", [save("a"), save("b", r=2)], two).what is not None
    refused(ConfigError, "target_modules", [save("a"), save("c", target_modules=["up"])], two)
    refused(ConfigError, "target_modules", [save("a"), save("d", rank_pattern={"up": 2})], two)  # seen after loading
    for name, fields in {"e": {"use_dora": True}, "f": {"lora_bias": True}, "g": {"kasa_config": {}}}.items():
        assert refused(ConfigError, next(iter(fields)), [save("a"), save(name, **fields)], two).where is not None


def test_other_kinds_and_missing_files(save: Save, tmp_path: Path) -> None:
    one = ArrowConfig(top_k=1)
    refused(ConfigError, "arrow_config", [save("conv", CONV2)], one, base=CONV2.model())
    (tmp_path / "empty").mkdir()
    refused(AdapterFileError, None, [str(tmp_path / "empty")], one)
    broken = save("a")
    (Path(broken) / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(LorakitError):
        create_arrow_model(LINEARS.model(), [broken], one)


def test_where_an_adapter_is() -> None:
    assert source_of("user/repo") == ("user/repo", None)
    assert source_of("user/repo/sub/folder/") == ("user/repo", "sub/folder")
    assert source_of("name") == ("name", None)
