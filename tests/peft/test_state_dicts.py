"""State dicts of an adapter and of its base, compared with the installed peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.errors import AdapterError, AdapterFileError
from lorakit.peft import (
    LoraConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["0"]},
    "dora": {"target_modules": ["0"], "use_dora": True},
    "copied": {"target_modules": ["0"], "modules_to_save": ["2"]},
    "biases": {"target_modules": ["0"], "bias": "all"},
    "bias of B": {"target_modules": ["0"], "lora_bias": True},
    "monteclora": {"target_modules": ["0"], "monteclora_config": {"num_samples": 2}},
    "velora": {"target_modules": ["0"], "velora_config": {"init_type": "random", "num_groups": 2}},
}


def base() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def adapted(config: dict[str, Any], seed: int = 1) -> Any:
    plain = base()
    torch.manual_seed(seed)
    model = get_peft_model(plain, LoraConfig(**config, init_lora_weights=False))
    model.add_adapter("b", LoraConfig(target_modules=["0"], init_lora_weights=False))
    return model


@pytest.mark.parametrize("which", CONFIGS)
def test_names_and_shapes_are_pefts(which: str) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**CONFIGS[which]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the bias of a B for a matrix that lost an axis
        wanted = {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(theirs).items()}
    found = get_peft_model_state_dict(adapted(CONFIGS[which]))
    assert {name: tuple(t.shape) for name, t in found.items()} == wanted


@pytest.mark.parametrize("which", CONFIGS)
def test_out_and_in_again(which: str) -> None:
    model, other = adapted(CONFIGS[which]).eval(), adapted(CONFIGS[which], 2).eval()
    x = torch.randn(5, 4)
    assert not torch.equal(model(x), other(x))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.unexpected_keys == [] and torch.equal(model(x), other(x))


def test_values_from_elsewhere() -> None:
    model = adapted(CONFIGS["plain"])
    gathered = {name: torch.full_like(tensor, 7.0) for name, tensor in model.state_dict().items()}
    assert all((t == 7).all() for t in get_peft_model_state_dict(model, gathered).values())


def test_a_bare_model_has_no_prefix() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), base())
    names = list(get_peft_model_state_dict(model))
    assert names == ["0.lora_A.weight", "0.lora_B.weight"]
    result = set_peft_model_state_dict(model, {f"base_model.model.{n}": torch.ones(8, 4) for n in names[:1]})
    assert result.unexpected_keys == [] and (model[0].lora_A["default"].weight == 1).all()


def test_what_does_not_fit() -> None:
    model = adapted(CONFIGS["plain"])
    with pytest.warns(UserWarning, match="has no parameters for these tensors: nowhere"):
        assert set_peft_model_state_dict(model, {"nowhere": torch.ones(1)}).unexpected_keys == ["nowhere"]
    wrong = {"base_model.model.0.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(AdapterFileError, match="size mismatch"):
        set_peft_model_state_dict(model, wrong)
    with pytest.warns(UserWarning, match="because you passed `ignore_mismatched_sizes=True`"):
        set_peft_model_state_dict(model, wrong, ignore_mismatched_sizes=True)
    for do in (get_peft_model_state_dict, lambda m, adapter_name: set_peft_model_state_dict(m, {}, adapter_name)):
        with pytest.raises(AdapterError, match="Adapter c not found") as refused:
            do(model, adapter_name="c")
        assert (refused.value.what, refused.value.allowed) == ("c", ("default", "b"))


def test_factors_without_memory_get_it() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), base(), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "lora" in n} == {"meta"}
    set_peft_model_state_dict(model, {"0.lora_A.weight": torch.ones(8, 4), "0.lora_B.weight": torch.ones(6, 8)})
    assert {p.device.type for p in model.parameters()} == {"cpu"} and (model[0].lora_B["default"].weight == 1).all()


def test_the_base_out_and_in() -> None:
    model = adapted(CONFIGS["copied"])
    plain = base().state_dict()
    found = get_base_model_state_dict(model)
    assert list(found) == list(plain) and all(torch.equal(found[name], plain[name]) for name in plain)
    set_base_model_state_dict(model, {name: tensor + 1 for name, tensor in plain.items()})
    assert torch.equal(model.base_model.model[0].base_layer.weight, plain["0.weight"] + 1)
    with pytest.raises(AdapterFileError, match=r"Missing key\(s\): \['0.bias'.*Unexpected key\(s\): \['x'\]"):
        set_base_model_state_dict(model, {"0.weight": plain["0.weight"], "x": torch.ones(1)})
    assert set_base_model_state_dict(model, {"x": torch.ones(1)}, strict=False).unexpected_keys == ["x"]
    with pytest.raises(AdapterFileError, match=r"size mismatch in the base's state dict: 0\.weight"):
        set_base_model_state_dict(model, {"0.weight": torch.ones(1)}, strict=False)


def test_embeddings_are_added_where_they_are_asked_for(tiny_llama: Any) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    more = set(get_peft_model_state_dict(model, save_embedding_layers=True)) - set(get_peft_model_state_dict(model))
    assert more == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        get_peft_model_state_dict(adapted(CONFIGS["plain"]), save_embedding_layers=True)


@pytest.mark.parametrize("around", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_values_of_a_wrapped_model(around: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS["plain"])
    given = {f"{around}{name}": tensor for name, tensor in model.state_dict().items()}
    found, own = get_peft_model_state_dict(model, given), get_peft_model_state_dict(model)
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
    inner = {name.replace(".0.", f".0.{around}", 1): tensor for name, tensor in model.state_dict().items()}
    if not around.startswith("module"):  # inside a model that may be a module's own name
        assert get_peft_model_state_dict(model, inner).keys() == own.keys()
    model.save_pretrained(tmp_path, state_dict=given)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == own.keys()


@pytest.mark.parametrize("given", [{}, {"base_model.model.0.lora_A.default.weight": torch.ones(8, 4)}])
def test_values_that_are_not_there_are_said(given: dict[str, Tensor], tmp_path: Path) -> None:
    model = adapted(CONFIGS["plain"])
    with pytest.warns(UserWarning, match=r"`state_dict` lacks \d+ of the \d+ tensors of adapter 'default'"):
        assert len(get_peft_model_state_dict(model, given)) == len(given)
    with pytest.warns(UserWarning, match=r"base_model\.model\.0\.lora_B\.weight"):
        model.save_pretrained(tmp_path, state_dict=given)


def test_a_replaced_method_decides_what_is_saved(tmp_path: Path) -> None:
    model = adapted(CONFIGS["plain"])
    whole = {name: torch.full_like(tensor, 7.0) for name, tensor in model.state_dict().items()}
    on_disk = get_peft_model_state_dict(model, whole)
    for given in (whole, on_disk):  # programs replace the method by one that returns the adapter's tensors alone, too
        model.state_dict = lambda given=given: given
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert saved.keys() == on_disk.keys() and all((tensor == 7).all() for tensor in saved.values())
    del whole["base_model.model.0.lora_A.default.weight"]
    model.state_dict = lambda: whole
    with pytest.warns(UserWarning, match=r"lacks 1 of the 2 tensors.*base_model\.model\.0\.lora_A\.weight"):
        model.save_pretrained(tmp_path, selected_adapters=["default"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensor: tensor * torch.nan, r"adapter 'default': implausible: NaN or infinite values \(tensors: 2\)"),
        (lambda tensor: tensor * 1e9, r"adapter 'default': implausible: Implausibly large values \(tensors: 2\)"),
        (lambda tensor: tensor * 0, r"adapter 'default': implausible: B·A is zero at all sites, first 0"),
    ],
    ids=["nan", "large", "zero"],
)
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_implausible_values_are_warned_about_as_when_loading(change: Any, expected: str, prefix: str) -> None:
    model = adapted(CONFIGS["plain"])
    model.set_requires_grad("default", False)
    good = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    bad = {prefix + key.removeprefix("base_model.model."): change(tensor) for key, tensor in good.items()}
    with pytest.warns(UserWarning, match=expected):
        result = set_peft_model_state_dict(model, bad)
    assert result.unexpected_keys == []
    after = get_peft_model_state_dict(model)
    assert all(torch.allclose(after[key], change(tensor), equal_nan=True) for key, tensor in good.items())


def test_plausible_values_and_zeros_that_will_be_trained_are_not_warned_about() -> None:
    model = adapted(CONFIGS["plain"])
    zero = {key: tensor * 0 for key, tensor in get_peft_model_state_dict(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_peft_model_state_dict(model, get_peft_model_state_dict(model))
        set_peft_model_state_dict(model, zero)
