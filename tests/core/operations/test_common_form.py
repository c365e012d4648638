"""The common form against real peft, which applies the original adapter, and against the arithmetic of SGLang."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from tests.laws.zoo import OF_VARIANT
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.nested import BdLoraConfig
from lorakit.core import CommonAdapter, common_form
from lorakit.core.operations.writing import write
from lorakit.core.variants import variant_named
from lorakit.errors import AdapterError, AdapterFileError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore:.*(lora_bias=True|invalid shape)"),
]

IDS = torch.arange(24).view(2, 12)
TARGETS = ["q_proj", "v_proj", "down_proj"]
PLAIN = {
    "alpha": {"lora_alpha": 12},
    "rslora": {"use_rslora": True},
    "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
    "expression": {"target_modules": r".*\.0\..*(q_proj|down_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "olora": {"init_lora_weights": "orthogonal"},
}
NOT_PLAIN = {
    "DoRA": {"use_dora": True},
    "lm_head": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def peft_adapter(base: nn.Module, folder: Path, **settings: Any) -> Tensor:
    """Save an adapter of real peft with random factors, and return its logits."""
    config = peft.LoraConfig(**{"r": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return logits(model)


def check_common(adapter: CommonAdapter) -> None:
    factors, config = adapter.weights.factors.values(), adapter.weights.config
    assert {(factor.A.dtype, factor.B.dtype) for factor in factors} == {(torch.float32, torch.float32)}
    assert {factor.r for factor in factors} == {adapter.rank}
    assert config.lora_alpha == config.r == adapter.rank
    assert not (config.use_rslora or config.rank_pattern or config.alpha_pattern)


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_peft_computes_the_same_from_the_common_form(base: nn.Module, tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = peft_adapter(base, tmp_path / "original", **settings)
    adapter = common_form(tmp_path / "original")
    check_common(adapter)
    write(adapter.weights, tmp_path / "common")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "common").eval()
    assert (expected - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_one_scale_of_alpha_over_r_is_enough(base: nn.Module, tmp_path: Path, settings: dict[str, Any]) -> None:
    """SGLang multiplies by lora_alpha / r of the config at every site (sglang/srt/lora/lora.py, 0.5.23)."""
    expected = peft_adapter(base, tmp_path / "original", **settings)
    weights = common_form(tmp_path / "original").weights
    model = copy.deepcopy(base)
    with torch.no_grad():
        for path, factor in weights.factors.items():
            model.get_submodule(path).weight += weights.config.lora_alpha / weights.config.r * factor.B @ factor.A
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("what", "settings"), NOT_PLAIN.items(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_named(base: nn.Module, tmp_path: Path, what: str, settings: dict[str, Any]) -> None:
    peft_adapter(base, tmp_path / "original", **settings)
    with pytest.raises(AdapterError, match=what) as caught:
        common_form(tmp_path / "original")
    assert caught.value.where == str(tmp_path / "original")
    assert what in str(caught.value.what)


VARIANTS: dict[str, dict[str, Any]] = {
    **OF_VARIANT,
    "bdlora": {"use_bdlora": BdLoraConfig(["q_proj"], ["down_proj"], nblocks=2)},
    "pissa": {"init_lora_weights": "pissa"},
}
REJECTED = {"dora", "kasa"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_exact_or_rejected_by_name(base: nn.Module, tmp_path: Path, name: str) -> None:
    model = copy.deepcopy(base)
    core.attach(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **VARIANTS[name]}))
    with torch.no_grad():
        torch.manual_seed(1)
        for _, parameter in core.trainable_parameters(model):
            parameter += 0.2 * torch.randn_like(parameter)
    expected = logits(model.eval())
    core.save_adapter(model, tmp_path / "original")
    if name in REJECTED:
        with pytest.raises((AdapterError, AdapterFileError)) as caught:
            common_form(tmp_path / "original")
        assert variant_named(name).title in str(caught.value.what)
        return
    adapter = common_form(tmp_path / "original")
    check_common(adapter)
    assert adapter.invocation == tuple(VARIANTS[name].get("alora_invocation_tokens", ()))
    write(adapter.weights, tmp_path / "common")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "common").eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-6)


def test_peft_s_qa_lora_is_rejected_unless_it_is_plain_lora(base: nn.Module, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=TARGETS, use_qalora=True, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "one")  # A reads each input, because the base is not quantized by GPTQ
    with pytest.raises(AdapterFileError) as caught:
        common_form(tmp_path / "one")
    assert caught.value.field == "use_qalora"
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": False}))
    write(common_form(tmp_path / "one").weights, tmp_path / "common")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "common").eval()
    torch.testing.assert_close(logits(again), logits(theirs.eval()), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "edit",
    [
        {"r": 4},
        {"rank_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"target_modules": ["q_proj"]},
        {"trainable_token_indices": [3]},
    ],
)
def test_tensors_that_do_not_match_the_config(base: nn.Module, tmp_path: Path, edit: dict[str, Any]) -> None:
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | edit))
    with pytest.raises(AdapterFileError):
        common_form(tmp_path)


def test_values_that_are_not_finite_are_rejected(base: nn.Module, tmp_path: Path) -> None:
    peft_adapter(base, tmp_path)
    tensors = core.read_adapter(tmp_path).file.tensors
    tensors[next(iter(tensors))][0, 0] = torch.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError):
        common_form(tmp_path)
