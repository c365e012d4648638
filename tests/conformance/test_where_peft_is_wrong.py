"""Behavior in which peft is wrong, compared with a formula; `differences.WHERE_PEFT_IS_WRONG` lists all."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit.peft as ours
from lorakit.errors import AdapterError, ConfigError, RouteError, TargetError

from .architectures import model_named, outputs_of
from .closeness import assert_close, assert_differs, assert_same_bits
from .differences import WHERE_PEFT_IS_WRONG
from .rows import Row, copy_adapters, quiet_peft, randomise, theirs

LLAMA = Row("llama", "llama-words", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]})
TIED = Row("tied", "llama-tied-words", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "embed_tokens"]})
LINEAR = Row("linear", "sequential", {"target_modules": ["up"]})
DORA = Row("dora", "sequential", {"target_modules": ["up"], "use_dora": True})


def test_every_entry_has_a_test() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(WHERE_PEFT_IS_WRONG) == tests - {"every_entry_has_a_test"}


def test_saved_modules_are_matched_at_a_dot() -> None:
    model = nn.Sequential(OrderedDict(up=nn.Linear(4, 4), timeout=nn.Linear(4, 4), out=nn.Linear(4, 2)))
    wrapped = ours.get_peft_model(model, ours.LoraConfig(target_modules=["up"], modules_to_save=["out"]))
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"up", "out"}


def test_unknown_adapters_are_refused() -> None:
    _, model = LLAMA.pair("a", "b")
    for call in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(AdapterError, match=r"Adapter 'typo' not found on this model; available: a, b\."):
            call(["typo"])
    with pytest.raises(AdapterError, match=r"Adapter typo not found\. Available: a, b\."):
        model.set_adapter("typo")
    with pytest.raises(RouteError, match=r"Adapter 'typo' not found on this model; available: a, b\."):
        model.base_model.set_adapter("typo")


def test_unmerging_restores_bits() -> None:
    _, model = LLAMA.pair()
    model.to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model.state_dict(), before)


def test_disable_while_merged_is_for_a_block() -> None:
    _, model = LLAMA.pair()
    with torch.no_grad():
        plain = outputs_of(model_named(LLAMA.model)(**LLAMA.inputs))
        model.merge_adapter()
        merged = outputs_of(model(**LLAMA.inputs))
        with model.disable_adapter():
            assert_same_bits(outputs_of(model(**LLAMA.inputs)), plain)
        assert_same_bits(outputs_of(model(**LLAMA.inputs)), merged)
    assert_differs(merged, plain)


def test_a_failed_mixed_batch_leaves_nothing() -> None:
    _, model = LLAMA.pair("a", "b")
    with torch.no_grad():
        before = outputs_of(model(**LLAMA.inputs))
        with pytest.raises(RouteError, match="one adapter per row of the batch"):
            model(**LLAMA.inputs, adapter_names=["b", "b"])
        handle = model.get_base_model().lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**LLAMA.inputs, adapter_names=["b", "b", "b"])
        handle.remove()
        assert_same_bits(outputs_of(model(**LLAMA.inputs)), before)


def test_a_failed_call_leaves_the_model() -> None:
    base = model_named("sequential")
    before = dict(base.state_dict())
    with pytest.raises(TargetError, match="does not support"):
        ours.get_peft_model(base, ours.LoraConfig(target_modules=["up", "act"]))
    assert [type(m) for m in base] == [type(m) for m in model_named("sequential")]
    assert_same_bits(base.state_dict(), before)
    assert all(p.requires_grad for p in base.parameters())


def test_mismatched_files_are_named(tmp_path: Path) -> None:
    peft_model, _ = LLAMA.pair()
    with quiet_peft():
        peft_model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    del tensors[gone]
    save_file({**tensors, "base_model.model.stranger.lora_A.weight": torch.zeros(2, 2)}, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="loaded in part as allowed") as said:
        ours.PeftModel.from_pretrained(model_named(LLAMA.model), tmp_path)
    text = " ".join(str(w.message) for w in said)
    assert f"missing {gone}" in text
    assert "unexpected site stranger" in text


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")
def test_the_config_is_only_read(tmp_path: Path) -> None:
    fields = {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    config = ours.LoraConfig(**fields, task_type="CAUSAL_LM")
    before = dataclasses.replace(config)
    model = ours.get_peft_model(
        model_named("gpt2-words"), ours.LoraConfig(task_type="SEQ_CLS", target_modules=["c_fc"])
    )
    with pytest.warns(RuntimeWarning, match="rank_pattern key 'q_proj' matches none"):
        model.add_adapter("b", config)
    model.set_adapter("b")
    model.save_pretrained(tmp_path)
    assert config == before
    live = dataclasses.replace(model.peft_config["b"])
    model.save_pretrained(tmp_path)
    assert model.peft_config["b"] == live
    assert model.peft_config["b"] is not config


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")
def test_a_merge_unties_with_a_word(tmp_path: Path) -> None:
    _, model = TIED.pair()
    with torch.no_grad():
        adapted = outputs_of(model(**TIED.inputs))
        head = model.get_base_model().lm_head.weight.detach().clone()
        with pytest.warns(
            UserWarning, match=r"shares its weight with lm_head\.weight; merging gives the former a separate weight"
        ):
            merged = model.merge_and_unload()
        assert torch.equal(merged.lm_head.weight, head)
        assert_close(outputs_of(merged(**TIED.inputs)), adapted, rtol=2e-5)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = type(merged).from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(outputs_of(again(**TIED.inputs)), adapted, rtol=2e-5)


def test_several_dora_adapters_add() -> None:
    _, model = DORA.pair("a", "b")
    x = DORA.inputs["input"]
    layer = model.get_base_model().up
    expected = W = layer.base_layer.weight.detach().double()
    for name in ("a", "b"):
        A, B = (getattr(layer, f"lora_{side}")[name].weight.detach().double() for side in "AB")
        moved = W + layer.scaling[name] * B @ A
        magnitude = layer.lora_magnitude_vector[name].weight.detach().double()
        expected = expected + (magnitude / moved.norm(dim=1)).unsqueeze(1) * moved - W
    plain = model_named("sequential")
    with torch.no_grad():
        plain.up.weight.copy_(expected)
        for order in (["a", "b"], ["b", "a"]):
            model.base_model.set_adapter(order)
            assert_close({"y": model(x)}, {"y": plain(x)}, rtol=5e-6)
        merged = model.merge_and_unload(adapter_names=["b", "a"])
    assert_close({"W": merged.up.weight}, {"W": plain.up.weight})


def test_layers_hold_for_full_paths() -> None:
    targets = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    config = ours.LoraConfig(target_modules=targets, layers_to_transform=[1])
    with pytest.warns(
        RuntimeWarning, match="'model.layers.0.self_attn.q_proj' matches only modules that are excluded or in"
    ):
        model = ours.get_peft_model(model_named("llama-words"), config)
    assert model.targeted_module_names == targets[1:]


def test_layers_at_the_top_count() -> None:
    base = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3)])})
    model = ours.get_peft_model(base, ours.LoraConfig(target_modules=["up"], layers_to_transform=[0, 2]))
    assert model.targeted_module_names == ["layers.0.up", "layers.2.up"]


def test_dropout_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_dropout is -0\.1; it must be in \[0, 1\)\."):
        ours.LoraConfig(lora_dropout=-0.1)


def test_merged_and_dora_rows_mix() -> None:
    for row in (DORA, LINEAR):
        _, model = row.pair("a", "b")
        x = row.inputs["input"]
        with torch.no_grad():
            alone = {}
            for name in ("a", "b"):
                model.set_adapter(name)
                alone[name] = model(x)
            with model.disable_adapter():
                alone["__base__"] = model(x)
            names = ["b", "__base__", "a"]
            expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
            assert_close({"y": model(x, adapter_names=names)}, {"y": expected})
            model.merge_adapter(["a"])
            assert_close({"y": model(x, adapter_names=names)}, {"y": expected})


@pytest.mark.filterwarnings("ignore:Adapter 'default' applies to a base")
def test_a_converted_dora_keeps_its_magnitude(tmp_path: Path) -> None:
    row = Row("moved", "sequential", {"target_modules": ["up"], "use_dora": True, "init_lora_weights": "pissa"})
    models = {library: row.wrapped(library).eval() for library in (theirs, ours)}
    for library, model in models.items():
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "began" / library.__name__)
        model.peft_config["default"].init_lora_weights = "pissa"
    randomise(models[theirs])
    copy_adapters(models[theirs], models[ours])
    magnitudes = {}
    for library, model in models.items():
        folder, began = tmp_path / library.__name__, tmp_path / "began" / theirs.__name__
        with quiet_peft():
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(began))
        written = load_file(folder / "adapter_model.safetensors")
        magnitudes[library] = [name for name in written if "lora_magnitude_vector" in name]
    assert magnitudes == {theirs: [], ours: ["base_model.model.up.lora_magnitude_vector"]}
    with quiet_peft(), torch.no_grad():
        loaded = theirs.PeftModel.from_pretrained(model_named(row.model), tmp_path / ours.__name__)
        expected = outputs_of(models[theirs](**row.inputs))
        assert_close(outputs_of(loaded(**row.inputs)), expected, rtol=1e-5)


def test_merging_rounds_once() -> None:
    errors: dict[str, Any] = {}
    for library in (theirs, ours):
        torch.manual_seed(0)
        layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
        with quiet_peft():
            model = library.get_peft_model(nn.Sequential(layer), library.LoraConfig(r=8, target_modules=["0"]))
        torch.manual_seed(1)
        site = model.base_model.model[0]
        with torch.no_grad():
            for side in (site.lora_A, site.lora_B):
                side["default"].weight.copy_(0.05 * torch.randn(side["default"].weight.shape))
        A, B = site.lora_A["default"].weight.double(), site.lora_B["default"].weight.double()
        exact = layer.weight.double() + B @ A
        merged = model.merge_and_unload(safe_merge=True)[0].weight
        errors[library.__name__] = float((merged.double() - exact).abs().mean().detach())
        if library is ours:
            same = (merged == exact.to(torch.bfloat16)).double().mean()
            assert float(same) > 0.999  # except ties that fp32 rounds differently
    assert errors["lorakit.peft"] <= errors["peft"]
    assert math.isfinite(errors["peft"])


def test_without_kasa_the_base_is_whole() -> None:
    row = Row("kasa", "sequential", {"target_modules": ["up"], "kasa_config": {}})
    peft_model, model = row.pair()
    plain = model_named(row.model)
    with torch.no_grad():
        expected, acting = outputs_of(plain(**row.inputs)), outputs_of(model(**row.inputs))
        assert_close(acting, outputs_of(peft_model(**row.inputs)))
        with model.disable_adapter(), peft_model.disable_adapter():
            assert_same_bits(outputs_of(model(**row.inputs)), expected)
            assert_differs(outputs_of(peft_model(**row.inputs)), expected)
        model.merge_adapter()
        assert_close(outputs_of(model(**row.inputs)), acting, rtol=1e-5)
        model.unmerge_adapter()
        unloaded, their_unloaded = model.unload(), peft_model.unload()
        assert_same_bits(dict(unloaded.state_dict()), dict(plain.state_dict()))
        assert not torch.equal(their_unloaded.up.weight, plain.up.weight)


def test_kasa_ranks_do_not_add_up() -> None:
    fields = {"target_modules": ["up"], "kasa_config": {}}
    model = Row("kasa", "sequential", fields).pair("a")[1]
    with pytest.raises(ConfigError, match="KaSA changes the base weight, but adapter 'a' has already changed"):
        model.add_adapter("b", ours.LoraConfig(r=2, **fields))
    with pytest.raises(ConfigError, match="KaSA cannot be combined with adapters that don't use KaSA"):
        model.add_adapter("b", ours.LoraConfig(r=4, target_modules=["up"]))
    assert list(model.peft_config) == ["a"]
