"""Methods of adapted layers that change factors or the base weight: the values are those of the installed peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorakit.peft as ours
from lorakit.core.variants import variant_named
from lorakit.errors import ConfigError, MergeError, NotYetSupported
from lorakit.peft.tuners.lora import variants

theirs = pytest.importorskip("peft")
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """A model with an embedding, a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dense, self.conv = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Conv1d(6, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.dense(x + self.table(torch.arange(5))).T[None])


def both(**fields: Any) -> tuple[Any, Any]:
    """Return a wrapped model of each library with equal tensors: (peft's, ours)."""
    made = []
    for library in (theirs, ours):
        torch.manual_seed(3)
        config = library.LoraConfig(**{"target_modules": ["table", "dense", "conv"], "r": 2} | fields)
        made.append(library.get_peft_model(Small(), config).eval())
    made[1].load_state_dict(made[0].state_dict())  # peft draws more numbers than it uses
    return made[0], made[1]


def equal(first: Any, second: Any, drawn: str = "") -> None:
    """Check that two models have equal tensors and outputs; tensors whose names contain a word are copied first."""
    for name, tensor in second.state_dict().items():
        if drawn and drawn in name:
            assert tensor.shape == first.state_dict()[name].shape and bool(tensor.any()) == bool(
                first.state_dict()[name].any()
            )
            tensor.copy_(first.state_dict()[name])
    tensors = first.state_dict(), second.state_dict()
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensors[1][name], tensor), name
    assert torch.allclose(first(X), second(X), atol=1e-6)
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (first, second)]
    assert flags[0] == flags[1]


PATHS = ("table", "dense", "conv")


def at(model: Any, path: str) -> Any:
    """Return an adapted layer."""
    return model.base_model.model.get_submodule(path)


@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_reset_lora_parameters(path: str, init: bool | str) -> None:
    models = both(lora_bias=False)
    for model in models:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.5)
        torch.manual_seed(11)
        at(model, path).reset_lora_parameters("default", init)
        at(model, path).reset_lora_parameters("absent", init)
    equal(*models)


def test_resetting_zeroes_the_bias_of_B() -> None:
    models = both(target_modules=["dense"], lora_bias=True)
    for model in models:
        with torch.no_grad():
            at(model, "dense").lora_B["default"].bias.fill_(2.0)
        torch.manual_seed(11)
        at(model, "dense").reset_lora_parameters("default", True)
    equal(*models)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.3},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"use_dora": True},
        {"inference_mode": True},
    ],
    ids=str,
)
def test_update_layer_replaces_an_adapter(path: str, fields: dict[str, Any]) -> None:
    models = both()
    for library, model in zip((theirs, ours), models, strict=True):
        torch.manual_seed(11)
        at(model, path).update_layer("default", 3, lora_alpha=12, config=library.LoraConfig(**fields))
        assert (at(model, path).r["default"], at(model, path).lora_alpha["default"]) == (3, 12)
    assert at(models[1], path).scaling == pytest.approx(at(models[0], path).scaling)
    equal(*models)


def test_update_layer_adds_an_adapter_that_can_be_activated() -> None:
    models = both()
    for library, model in zip((theirs, ours), models, strict=True):
        torch.manual_seed(11)
        config = library.LoraConfig(init_lora_weights=False)
        at(model, "dense").update_layer("second", 3, lora_alpha=12, config=config, target_name="dense")
        assert not at(model, "dense").lora_A["second"].weight.requires_grad
        at(model, "dense").set_adapter("second")
    equal(*models, drawn="second")
    model = models[1]
    assert model.peft_config["second"].init_lora_weights is False
    model.set_adapter("second")
    assert at(model, "table").active_adapters == ["second"] and at(model, "table").r.keys() == {"default"}


def test_what_update_layer_rejects_changes_nothing() -> None:
    model = both()[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = at(model, "dense")
    for r, fields, field in (
        (0, {}, "r"),
        (2, {"init_lora_weights": "pissa"}, "init_lora_weights"),
        (2, {"init_lora_weights": "eva", "eva_config": ours.EvaConfig()}, "init_lora_weights"),
        (2, {"kasa_config": ours.KasaConfig()}, "kasa_config"),
    ):
        with pytest.raises(ConfigError) as caught:
            layer.update_layer("second", r, lora_alpha=4, config=ours.LoraConfig(**fields))
        assert caught.value.field == field
    with pytest.raises(ConfigError, match="init_lora_weights"):
        layer.reset_lora_parameters("default", "olora")
    layer.merge()
    with pytest.raises(MergeError):
        layer.update_layer("default", 3, lora_alpha=4, config=ours.LoraConfig())
    with pytest.raises(MergeError):
        layer.reset_lora_parameters("default", True)
    layer.unmerge()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.peft_config.keys() == {"default"}


@pytest.mark.parametrize(
    ("fields", "of_peft", "of_ours"),
    [
        ({}, None, None),
        ({"use_dora": True}, "DoraLinearVariant", "dora"),
        ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant", "alora"),
        ({"velora_config": {}}, "VeloraLinearVariant", "velora"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_a_layer_shows_its_variant(fields: dict[str, Any], of_peft: str | None, of_ours: str | None) -> None:
    shown = [at(model, "dense").lora_variant for model in both(target_modules=["dense"], **fields)]
    assert [list(by_adapter) for by_adapter in shown] == [[] if of_peft is None else ["default"]] * 2
    if of_peft is None or of_ours is None:
        return
    assert type(shown[0]["default"]).__name__ == of_peft
    variant = shown[1]["default"]
    assert variant is variant_named(of_ours)
    named, other = (getattr(variants, name) for name in (of_peft, "KasaLinearVariant"))
    assert isinstance(variant, named) and not isinstance(variant, other) and not isinstance(None, named)
    with pytest.raises(NotYetSupported, match=f"{of_peft} cannot be instantiated"):
        named()


def test_ephemeral_offload_has_no_effect_on_a_processor() -> None:
    made = []
    for offloads in (False, True):
        torch.manual_seed(3)
        runtime = {"ephemeral_gpu_offload": offloads}
        config = ours.LoraConfig(target_modules=list(PATHS), r=2, use_dora=True, runtime_config=runtime)
        made.append(ours.get_peft_model(Small(), config).eval())
    equal(*made)


@pytest.mark.gpu
def test_ephemeral_offload_gives_the_same_magnitudes_on_a_gpu() -> None:
    found = []
    for offloads in (False, True):
        torch.manual_seed(3)
        config = ours.LoraConfig(
            target_modules=["dense"], use_dora=True, runtime_config={"ephemeral_gpu_offload": offloads}
        )
        found.append(at(ours.get_peft_model(Small(), config), "dense").lora_magnitude_vector["default"].weight)
    assert found[1].device.type == "cpu"
    torch.testing.assert_close(*found)


def test_factors_are_moved_to_the_dtype_of_the_base() -> None:
    models = both(target_modules=["dense"])
    for model in models:
        layer = at(model, "dense")
        layer.base_layer.to(torch.bfloat16)
        layer._move_adapter_to_device_of_base_layer("default")
        assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == torch.bfloat16
