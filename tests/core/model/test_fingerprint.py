"""The base's fingerprint: it ignores adapters, merges and trained biases, and detects other changes of a tensor."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, core
from lorakit.core.model.base_samples import Sample
from lorakit.core.model.fingerprint import (
    DIFFERENT,
    OTHER_PRECISION,
    SAME,
    UNVERIFIABLE,
    Fingerprint,
    compare,
    fingerprint,
)
from lorakit.durable import sealed, write_json
from lorakit.errors import BaseMismatchError


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))


def test_adapters_merges_and_biases_do_not_change_it(model: nn.Module) -> None:
    plain = fingerprint(model)
    core.attach(model, LoraConfig(target_modules=["1"], bias="all", modules_to_save=["2"], init_lora_weights=False))
    with torch.no_grad():
        for _, parameter in core.trainable_parameters(model):
            parameter.add_(1.0)
    assert fingerprint(model) == plain
    core.merge(model)
    assert fingerprint(model) == plain


def test_the_same_base(model: nn.Module) -> None:
    assert compare(fingerprint(model), fingerprint(copy.deepcopy(model)))[0] == SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_precision_is_still_the_same_base(model: nn.Module, dtype: torch.dtype) -> None:
    verdict, reason, _ = compare(fingerprint(model), fingerprint(copy.deepcopy(model).to(dtype)))
    assert verdict == OTHER_PRECISION and "the adapter's base was float32" in reason


def test_rounding_twice_is_within_one_step(model: nn.Module) -> None:
    twice = copy.deepcopy(model).to(torch.float16).to(torch.bfloat16)
    assert compare(fingerprint(model), fingerprint(twice))[0] == OTHER_PRECISION


def test_other_weights_of_the_same_shape_are_another_base(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(1.02)
    verdict, reason, _ = compare(fingerprint(model), fingerprint(other))
    assert verdict == DIFFERENT and "1 of 5 tensors" in reason and "1.weight" in reason


def test_other_shapes_are_another_base(model: nn.Module) -> None:
    verdict, reason, _ = compare(fingerprint(model), fingerprint(nn.Sequential(*model, nn.Linear(9, 9))))
    assert verdict == DIFFERENT and reason.startswith("names or shapes of the base's parameters differ")


def test_another_architecture_is_named(model: nn.Module) -> None:
    verdict, reason, _ = compare(fingerprint(model), fingerprint(nn.Linear(8, 8)))
    assert (verdict, reason) == (DIFFERENT, "the adapter's base is a Sequential, but this model is a Linear")


def test_without_a_fingerprint_or_numbers_nothing_can_be_said(model: nn.Module) -> None:
    assert compare(None, fingerprint(model))[0] == UNVERIFIABLE
    assert compare(fingerprint(model), fingerprint(copy.deepcopy(model).to("meta")))[0] == UNVERIFIABLE


def test_it_survives_json(model: nn.Module) -> None:
    made = fingerprint(model)
    assert Fingerprint.from_dict(made.as_dict()) == made


def llama(layers: int = 12, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes, **fields)).eval()


def differing(one: nn.Module, other: nn.Module) -> tuple[str, str]:
    verdict, reason, *_ = compare(fingerprint(one), fingerprint(other))
    return verdict, reason


def test_seventy_of_eighty_six_matrices_drawn_again_are_another_base() -> None:
    model = llama()
    matrices = sorted(name for name, parameter in model.named_parameters() if parameter.ndim == 2)
    assert len(matrices) == 86
    once_sampled = set(matrices[::5][:16])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in set(matrices) - once_sampled:
            other.get_parameter(name).normal_(std=0.02)
    verdict, reason = differing(model, other)
    assert verdict == DIFFERENT and "70 of 111" in reason


def test_any_tensor_that_was_replaced_is_another_base_and_is_named() -> None:
    model = llama(layers=2, attention_bias=True)
    plain = fingerprint(model)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape))
        verdict, reason, *_ = compare(plain, fingerprint(model))
        assert verdict == DIFFERENT and name in reason
        with torch.no_grad():
            parameter.copy_(before)
    assert compare(plain, fingerprint(model))[0] == SAME


def test_all_norms_replaced_are_another_base() -> None:
    model = llama(layers=3)
    other = copy.deepcopy(model)
    norms = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
    with torch.no_grad():
        for name in norms:
            other.get_parameter(name).mul_(1.01)
    verdict, reason = differing(model, other)
    assert verdict == DIFFERENT and f"{len(norms)} of " in reason and norms[0] in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_noise_of_two_parts_in_a_thousand_on_one_tensor_is_another_base(dtype: torch.dtype) -> None:
    model = llama(layers=2).to(dtype)
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            weight = other.get_parameter(name)
            noisy = weight.double() * (1 + 0.002 * torch.randn(weight.shape, dtype=torch.float64))
            weight.copy_(noisy)
        verdict, reason = differing(model, other)
        assert verdict == DIFFERENT and name in reason
        assert differing(llama(layers=2), other)[0] == DIFFERENT


def test_one_expert_of_a_fused_tensor_is_another_base() -> None:
    class Experts(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(count, 6, 10))

    for count in (8, 40, 128):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), Experts(count))
        plain = fingerprint(model)
        for expert in range(count):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other[1].gate_up_proj[expert].normal_()
            assert compare(plain, fingerprint(other))[0] == DIFFERENT, (count, expert)


PATHS = {
    "float32, bfloat16, float32": (torch.float32, (torch.bfloat16, torch.float32)),
    "float32, float16, float32": (torch.float32, (torch.float16, torch.float32)),
    "float32, float16, bfloat16": (torch.float32, (torch.float16, torch.bfloat16)),
    "float32, bfloat16, float16": (torch.float32, (torch.bfloat16, torch.float16)),
    "bfloat16, float32": (torch.bfloat16, (torch.float32,)),
    "bfloat16, float16": (torch.bfloat16, (torch.float16,)),
    "float16, bfloat16": (torch.float16, (torch.bfloat16,)),
    "float16, float32": (torch.float16, (torch.float32,)),
    "float64, bfloat16": (torch.float64, (torch.bfloat16,)),
}


@pytest.mark.parametrize("path", PATHS)
def test_rounding_on_the_way_leaves_the_base_what_it_is(path: str) -> None:
    begin, steps = PATHS[path]
    model = llama(layers=2).to(begin)
    other = copy.deepcopy(model)
    for dtype in steps:
        other = other.to(dtype)
    assert differing(model, other)[0] == OTHER_PRECISION
    assert differing(other, model)[0] == OTHER_PRECISION
    with torch.no_grad():
        other.model.norm.weight.mul_(1.01)
    assert differing(model, other)[0] == differing(other, model)[0] == DIFFERENT


def test_one_source_rounded_in_two_ways_is_one_base_and_noise_is_not() -> None:
    source = llama(layers=2)
    half, brain = copy.deepcopy(source).to(torch.float16), copy.deepcopy(source).to(torch.bfloat16)
    rounded_once_more = copy.deepcopy(half).to(torch.bfloat16)
    twice = [(a != b).any() for a, b in zip(brain.parameters(), rounded_once_more.parameters(), strict=True)]
    assert any(twice)  # so that exact comparison would not do
    assert differing(half, brain)[0] == differing(brain, half)[0] == OTHER_PRECISION
    with torch.no_grad():
        weight = source.get_parameter("model.layers.0.mlp.up_proj.weight")
        weight.mul_(1 + 0.002 * torch.randn(weight.shape))
    noisy = source.to(torch.bfloat16)
    assert differing(half, noisy)[0] == differing(noisy, half)[0] == DIFFERENT


def test_zeros_of_either_sign_and_nan_agree_with_themselves() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    other = copy.deepcopy(model)
    assert differing(model, other)[0] == SAME
    with torch.no_grad():
        other[0].weight[0] = torch.tensor([-0.0, 0.0, float("nan"), float("inf")])
    assert differing(model, other)[0] == SAME
    with torch.no_grad():
        other[0].weight[0, 2] = 1.0
    assert differing(model, other)[0] == DIFFERENT


def test_a_buffer_of_another_content_is_another_base_and_running_statistics_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model.register_buffer("shift", torch.randn(4))
    plain, other = fingerprint(model), copy.deepcopy(model)
    other.shift.add_(1.0)
    verdict, reason, *_ = compare(plain, fingerprint(other))
    assert verdict == DIFFERENT and "shift" in reason
    model.train()(torch.randn(8, 4))
    found = compare(plain, fingerprint(model))
    assert found.verdict == SAME and "running_mean" in found.warning


OLD = {
    "architecture": "Sequential",
    "parameters": 241,
    "names_sha256": "69676bd3f8edb810d723c745840e2becb35ee0d2233b7ca43e43c786f0e06fd7",
    "vocabulary": 0,
    "dtype": "float32",
    "samples": {
        "0.weight": "bf55bd4dbeabbf1e3e2bbdefbecdbf2f3dcdbe3cbeefbf403d09be80bf09bf51",
        "1.weight": "bf52bd493f39be283f1b3ea8bf0f3e5abf2c3dc9be393f17be973ef3bed2bf30",
        "3.weight": "bf45bd3dbe9ebf123e1ebdddbebdbf213dbdbe2dbeddbf313cfcbe6cbefcbf41",
    },
}
"""The fingerprint of `old_model` in format 1, written before fingerprints had a version."""


def old_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()) * 37 % 101 - 50.0).view(parameter.shape) / (60 + number))
    return model


def test_a_fingerprint_of_the_first_form_is_compared_as_before_and_says_what_it_covers() -> None:
    known = Fingerprint.from_dict(OLD)
    assert known is not None and known.as_dict() == OLD
    model = old_model()
    assert fingerprint(model, like=known).as_dict() == OLD
    verdict, reason, _ = compare(known, fingerprint(model, like=known))
    assert verdict == SAME and "3 matrices" in reason
    assert compare(known, fingerprint(old_model().to(torch.bfloat16), like=known))[0] == OTHER_PRECISION
    with torch.no_grad():
        model[2].weight.mul_(2.0)
    assert compare(known, fingerprint(model, like=known))[0] == SAME  # norms were not sampled
    with torch.no_grad():
        model[1].weight.mul_(1.02)
    verdict, reason, _ = compare(known, fingerprint(model, like=known))
    assert verdict == DIFFERENT and "1 of 3 tensors" in reason and "1.weight" in reason


def test_two_forms_cannot_be_compared_by_their_samples() -> None:
    known, model = Fingerprint.from_dict(OLD), old_model()
    assert known is not None
    verdict, reason, _ = compare(known, fingerprint(model))
    assert verdict == UNVERIFIABLE and "formats" in reason
    assert compare(known, fingerprint(nn.Linear(2, 2)))[0] == DIFFERENT


def test_an_adapter_of_the_first_form_loads_and_a_result_keeps_the_form(tmp_path: Path) -> None:
    core.attach(model := old_model(), LoraConfig(target_modules=["1"], init_lora_weights=False))
    core.save_adapter(model, tmp_path / "a")
    sidecar = tmp_path / "a" / "lorakit.json"
    write_json(sidecar, sealed({**json.loads(sidecar.read_text(encoding="utf-8")), "base": OLD}))
    assert core.load_adapter(old_model(), tmp_path / "a").base == SAME
    core.compress_folder(tmp_path / "a", tmp_path / "b", rank=2)
    assert json.loads((tmp_path / "b" / "lorakit.json").read_text(encoding="utf-8"))["base"] == OLD
    other = old_model()
    with torch.no_grad():
        other[3].weight.mul_(1.02)
    with pytest.raises(BaseMismatchError, match=r"first 3\.weight"):
        core.load_adapter(other, tmp_path / "a")


def test_it_survives_json_with_buffers_bounds_and_files(model: nn.Module) -> None:
    model.register_buffer("shift", torch.randn(4, dtype=torch.float64))
    made = dataclasses.replace(fingerprint(model.to(torch.bfloat16)), files={"model.safetensors": "0" * 64})
    assert made.buffers and Fingerprint.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    weight = made.samples["1.weight"]
    bounded = dataclasses.replace(made, samples={**made.samples, "1.weight": bound_of(weight)})
    assert bounded.bounds and Fingerprint.from_dict(json.loads(json.dumps(bounded.as_dict()))) == bounded


def bound_of(sample: Sample) -> Sample:
    return Sample("bitsandbytes 4-bit", sample.bits * 2, sample.bits)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"version": "2"},
        {"samples": {"float32": {"1.weight": "?"}}},
        {"samples": {"float32": {"1.weight": "AAA="}}},
        {"samples": {"float32": "AAAA"}},
        {"samples": None},
        {"buffers": {"float32": {"x": 1}}},
        {"bounds": {"1.weight": "AAAA"}},
        {"files": {"model.safetensors": 1}},
        {"vocabulary": "9"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_what_does_not_have_the_form_is_not_a_fingerprint(change: dict[str, Any], model: nn.Module) -> None:
    assert Fingerprint.from_dict({**fingerprint(model).as_dict(), **change}) is None
    assert Fingerprint.from_dict([1]) is Fingerprint.from_dict("x") is None


def test_a_base_with_norms_trained_together_with_the_adapter_is_another_one(tmp_path: Path) -> None:
    model = llama(layers=1)
    core.attach(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)  # what no adapter file holds
    core.save_adapter(model, tmp_path)
    with pytest.raises(BaseMismatchError, match=r"first model\.norm\.weight"):
        core.load_adapter(llama(layers=1), tmp_path)


def test_running_statistics_that_moved_are_a_warning_at_loading(tmp_path: Path) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model = plain()
    core.attach(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.train()(torch.randn(8, 4))
    core.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="running_mean"):
        assert core.load_adapter(plain(), tmp_path).base == SAME
