"""Adapters on experts, as `all-linear` selects them: counted, merged, unmerged, stored, combined, compressed, extracted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorakit.peft as ours
from lorakit import LoraConfig, core
from lorakit.errors import ConfigError, TargetError
from lorakit.hub.shapes import shape_of_module
from lorakit.plan import count

from ...peft.experts import BY_KIND, FAMILIES, WITH_TUPLES, Family, each, loss_and_logits, quiet, randomise
from ...speed.architectures import build, small_settings

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EVERY = (*FAMILIES, *WITH_TUPLES)
ALL_LINEAR = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
QWEN = BY_KIND["qwen3_moe"]


def adapted(family: Family, names: tuple[str, ...] = ("default",)) -> Any:
    """Return a small model with adapters of different values."""
    model = family.model()
    for scale, name in enumerate(names, 1):
        core.attach(model, ALL_LINEAR, name)
        with torch.no_grad():
            for index, (_, parameter) in enumerate(core.trainable_parameters(model, name)):
                generator = torch.Generator().manual_seed(100 * scale + index)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def state(model: Any) -> dict[str, Tensor]:
    """Return a copy of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", each(EVERY))
def test_a_plan_counts_what_is_attached_and_reports_the_same_rest(family: Family) -> None:
    model = family.model()
    planned = count(shape_of_module(model, "small", "test"), ALL_LINEAR)
    report = core.attach(model, ALL_LINEAR)
    assert planned.trainable == report.trainable_parameters
    assert {site.path for site in planned.sites} == {
        f"{match.path}.{match.parameter}" if match.parameter else match.path for match in report.matches
    }
    rests = [[note.text for note in notes if note.kind == "left_out"] for notes in (planned.notes, report.notes)]
    assert rests[0] == rests[1]


def test_tied_weights_count_once_in_what_is_left_out() -> None:
    model = BY_KIND["gpt_oss"].model()
    model.lm_head.weight = model.model.embed_tokens.weight
    planned = count(shape_of_module(model, "small", "test"), ALL_LINEAR)
    texts = [
        [note.text for note in one.notes if note.kind == "left_out"]
        for one in (planned, core.attach(model, ALL_LINEAR))
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 1


@pytest.mark.parametrize("family", [BY_KIND["mixtral"], BY_KIND["gpt_oss"]], ids=str)
def test_what_a_default_leaves_out_is_reported_by_the_peft_api(family: Family) -> None:
    targets = {} if family.kind == "mixtral" else {"target_modules": "all-linear"}  # peft has no default for gpt-oss
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj.*%"):
        model = ours.get_peft_model(family.model(), ours.LoraConfig(r=2, **targets))
    assert not any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    if family.kind == "mixtral":
        assert set(model.peft_config["default"].target_modules) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", each((QWEN, *WITH_TUPLES)))
def test_routers_that_return_tuples_are_left_alone(family: Family) -> None:
    model = family.model()
    left = pytest.warns(UserWarning, match="router.*not weights of plain linear layers.*target_parameters")
    with quiet() if family not in WITH_TUPLES else left:
        wrapped = ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules="all-linear"))
    randomise(wrapped)
    loss_and_logits(wrapped)[0].backward()
    assert not any(".router.lora_" in name for name, _ in wrapped.named_parameters())


@pytest.mark.parametrize("family", WITH_TUPLES, ids=str)
def test_an_adapter_of_peft_on_such_a_router_is_its_update_of_the_weights(family: Family, tmp_path: Path) -> None:
    """peft creates and saves this adapter, but its forward pass fails; W + s·B·A is what it stands for."""
    with quiet():
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(family.model(), config).save_pretrained(str(tmp_path))
    dense = family.model().eval()
    weights, tensors = dense.state_dict(), load_file(tmp_path / "adapter_model.safetensors")
    names = [name for name in tensors if name.endswith(".lora_A.weight")]
    assert any(".router." in name for name in names)
    with torch.no_grad():
        for name in names:
            site = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            weights[site] += 3 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    model = family.model().eval()
    core.load_adapter(model, tmp_path)
    wrapped = ours.PeftModel.from_pretrained(family.model().eval(), tmp_path)
    for one in (model, wrapped):
        torch.testing.assert_close(loss_and_logits(one)[1], loss_and_logits(dense)[1], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [{"target_modules": ["router"]}, {"target_parameters": ["router.weight"]}], ids=str)
@pytest.mark.parametrize("family", WITH_TUPLES, ids=str)
def test_such_a_router_is_adapted_as_a_parameter(family: Family, targets: dict[str, list[str]]) -> None:
    model = family.model()
    before = loss_and_logits(model)[1]
    core.attach(model, LoraConfig(r=2, **{"target_modules": [], **targets}))
    with torch.no_grad():
        for _, parameter in core.trainable_parameters(model):
            parameter.fill_(0.5)
    loss, changed = loss_and_logits(model)
    loss.backward()
    assert not torch.equal(changed, before)
    assert all(parameter.grad is not None for _, parameter in core.trainable_parameters(model))


@pytest.mark.parametrize("family", each(EVERY))
def test_merging_equals_the_adapter_and_unmerging_restores_the_bits(family: Family) -> None:
    model, before = adapted(family), state(family.model())
    expected = loss_and_logits(model)[1]
    core.merge(model)
    torch.testing.assert_close(loss_and_logits(model)[1], expected, **CLOSE)
    core.unmerge(model)
    core.detach(model)
    after = state(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_combining_and_compressing(tmp_path: Path) -> None:
    model = adapted(QWEN, ("a", "b"))
    with core.use(model, "a", "b"):
        expected = loss_and_logits(model)[1]
    core.combine(model, ["a", "b"], [1.0, 1.0], "sum", way="cat")
    with core.use(model, "sum"):
        torch.testing.assert_close(loss_and_logits(model)[1], expected, **CLOSE)
    core.save_adapter(model, tmp_path / "sum", "sum")
    core.compress_folder(tmp_path / "sum", tmp_path / "small", rank=1)
    plain = QWEN.model()
    core.load_adapter(plain, tmp_path / "small")
    assert {layer.layer.r["default"] for layer in core.sites(plain)} == {1}


def test_extracting_finds_the_update_of_a_merged_model() -> None:
    tuned = adapted(QWEN)
    expected = loss_and_logits(tuned)[1]
    core.merge_and_unload(tuned)
    base = QWEN.model()
    core.extract(base, tuned, LoraConfig(r=8, target_modules="all-linear"), "found", rank=8)
    with core.use(base, "found"):
        torch.testing.assert_close(loss_and_logits(base)[1], expected, **CLOSE)


def test_dropout_at_a_router_is_an_error_of_the_plan_too() -> None:
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    with pytest.raises(ConfigError) as caught:
        count(shape_of_module(QWEN.model(), "small", "test"), config)
    assert caught.value.fields["field"] == "lora_dropout"
    without = config.with_fields(exclude_modules=["gate"])
    planned = count(shape_of_module(QWEN.model(), "small", "test"), without)
    assert planned.trainable == core.attach(QWEN.model(), without).trainable_parameters


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "gate_proj"]},
        {"target_modules": ["down_proj"], "target_parameters": ["experts.down_proj"]},
        {"target_modules": [f"experts.{number}.down_proj" for number in range(9)]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": "all-linear", "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_a_config_that_is_not_possible_changes_nothing(fields: dict[str, Any]) -> None:
    model, before = QWEN.model(), state(QWEN.model())
    for attach in (core.attach, lambda *pair: ours.get_peft_model(*pair)):
        with quiet(), pytest.raises((ConfigError, TargetError)):
            attach(model, ours.LoraConfig(r=2, **fields))
        after = state(model)
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.filterwarnings("ignore")
def test_experts_whose_parameters_are_called_weight_are_reported_too() -> None:
    model = build("jetmoe", "JetMoeForCausalLM", small_settings("jetmoe", "JetMoeForCausalLM"))
    config = LoraConfig(r=2, target_modules=["kv_proj"])
    notes = (count(shape_of_module(model, "small", "test"), config).notes, core.attach(model, config).notes)
    assert all(note.kind != "left_out" for some in notes for note in some)  # the names were never those of experts
    core.detach(model)
    notes = (count(shape_of_module(model, "small", "test"), ALL_LINEAR).notes, core.attach(model, ALL_LINEAR).notes)
    one, other = ([note.text for note in some if note.kind == "left_out"] for some in notes)
    assert one == other
    assert "mlp.input_linear" in one[0] and "mlp.output_linear" in one[0]


def test_convolutions_are_not_experts() -> None:
    model = build("mamba", "MambaForCausalLM", small_settings("mamba", "MambaForCausalLM"))
    report = core.attach(model, LoraConfig(r=2, target_modules="all-linear", exclude_modules=["out_proj"]))
    assert all(note.kind != "left_out" for note in report.notes)
