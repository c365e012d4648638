"""Hot swapping: the values of an existing adapter are replaced by another one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import AdapterFileError, ConfigError, MergeError
from lorakit.peft import LoraConfig, PeftModel, get_peft_model
from lorakit.peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def base() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 6))


def saved(folder: Path, **fields: Any) -> PeftModel:
    torch.manual_seed(fields.get("r", 8))
    model = get_peft_model(base(), LoraConfig(target_modules=["0", "2"], init_lora_weights=False, **fields))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("rank", [2, 4, 6])
@pytest.mark.parametrize("padded", [True, False])
def test_a_swapped_adapter_is_the_other_one(rank: int, padded: bool, tmp_path: Path) -> None:
    saved(tmp_path / "a", r=4)
    wanted = saved(tmp_path / "b", r=rank, lora_alpha=3)(X)
    model = PeftModel.from_pretrained(base(), tmp_path / "a")
    if padded:
        before = model(X)
        prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
        torch.testing.assert_close(model(X), before, atol=1e-6, rtol=1e-5)
        assert model.peft_config["default"].r == 6
    hotswap_adapter(model, tmp_path / "b", "default")
    torch.testing.assert_close(model(X), wanted, atol=1e-6, rtol=1e-5)


def test_a_compiled_model_uses_the_swapped_adapter(tmp_path: Path) -> None:
    saved(tmp_path / "a", r=4)
    wanted = saved(tmp_path / "b", r=4, lora_alpha=3)(X)
    model = torch.compile(PeftModel.from_pretrained(base(), tmp_path / "a"), backend="eager")
    with torch.inference_mode():
        first = model(X)
        hotswap_adapter(model, tmp_path / "b", "default")
        torch.testing.assert_close(model(X), wanted, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(first, wanted)


def test_what_the_new_one_lacks_becomes_zero_and_what_it_has_too_much_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    key = "base_model.model.2.lora_B.default.weight"
    plain = base()(X)
    hotswap_adapter_from_state_dict(model, {key: torch.zeros(6, 8)}, "default", model.peft_config["default"])
    assert torch.equal(model(X), plain)
    with pytest.raises(AdapterFileError, match=r"unexpected keys found: base_model\.model\.1\.lora_B\.default\.weight"):
        hotswap_adapter_from_state_dict(model, {key.replace("2.", "1."): torch.zeros(1)}, "default", LoraConfig())
    with pytest.raises(AdapterFileError, match=r"Incompatible shapes .* \(6, 8\) and \(5, 7\)"):
        hotswap_adapter_from_state_dict(model, {key: torch.zeros(5, 7)}, "default", LoraConfig())
    model.merge_adapter()
    with pytest.raises(MergeError, match="currently merged into the base weights"):
        hotswap_adapter_from_state_dict(model, {}, "default", LoraConfig())


def test_a_rejected_tensor_leaves_the_adapter_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = LoraConfig(target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    model = get_peft_model(base(), config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    key = "base_model.model.2.modules_to_save.default.weight"
    with pytest.raises(AdapterFileError, match="unexpected keys found"):
        hotswap_adapter_from_state_dict(model, {key: torch.zeros(6, 64)}, "default", config)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_other_adapters_whose_names_begin_alike_are_unchanged(tmp_path: Path) -> None:
    model = saved(tmp_path / "ab")
    config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
    for name in ("d", "def", "defaulted"):
        model.add_adapter(name, config)
    before = {name: t.clone() for name, t in model.state_dict().items() if ".d." not in name}
    hotswap_adapter(model, tmp_path / "ab", "d")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(AdapterFileError, match="unexpected keys found"):
        hotswap_adapter_from_state_dict(
            model, {"base_model.model.2.lora_B.def.weight": torch.zeros(6, 8)}, "d", model.peft_config["d"]
        )


def test_configs_that_tensors_do_not_carry_must_agree() -> None:
    with pytest.raises(ConfigError, match="Configs are incompatible: for use_dora, False != True"):
        check_hotswap_configs_compatible(LoraConfig(), LoraConfig(use_dora=True))
    check_hotswap_configs_compatible(LoraConfig(r=3, lora_alpha=2), LoraConfig(r=4))


def test_getting_ready_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(base())
    model = saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="the original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    model._compiled_call_impl = True
    with pytest.raises(ConfigError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(model)
    with pytest.warns(UserWarning, match="result in re-compilation"):
        prepare_model_for_compiled_hotswap(model, check_compiled="warn")
    with pytest.raises(ConfigError, match="should be one of 'error', 'warn', or 'ignore'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="x")
    prepare_model_for_compiled_hotswap(model, check_compiled="ignore")
