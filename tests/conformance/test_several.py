"""Several adapters on one model: which act, which are trained, what is written, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit.peft as ours

from .architectures import loss_of, model_named, outputs_of
from .closeness import assert_close, assert_differs, assert_same_bits
from .rows import Row, copy_adapters, quiet_peft, randomise, theirs

ATTENTION = ["q_proj", "v_proj"]
WORD = {"task_type": "CAUSAL_LM"}
LINEAR = Row("linear", "llama-words", {**WORD, "target_modules": ATTENTION})
CONV1D = Row("conv1d", "gpt2-words", {**WORD, "target_modules": ["c_attn", "c_proj"]})
EMBEDDING = Row("embedding", "llama-words", {**WORD, "target_modules": ["embed_tokens", "q_proj"]})
HEAD = Row("head", "bert-classes", {"task_type": "SEQ_CLS", "target_modules": ["query"]})
DORA = Row("dora", "llama-words", {**WORD, "target_modules": ATTENTION, "use_dora": True})
KASA = Row("kasa", "llama-words", {**WORD, "target_modules": ATTENTION, "kasa_config": {}})
BDLORA = Row(
    "bdlora",
    "llama-words",
    {
        **WORD,
        "target_modules": ATTENTION,
        "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2},
    },
)
SEQUENCES = Row("sequences", "t5-words", {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "wo"]})
EACH = [LINEAR, CONV1D, EMBEDDING, HEAD, DORA, KASA, BDLORA, SEQUENCES]
ROUTED = [LINEAR, CONV1D, EMBEDDING, SEQUENCES]  # peft mixes neither DoRA nor copied heads in its own way


def unlike(row: Row, *fields: dict[str, Any]) -> tuple[Any, Any]:
    """A pair of models with adapters "a", "b", ... whose configs differ."""
    made = []
    for library in (theirs, ours):
        with quiet_peft():
            model = library.get_peft_model(model_named(row.model), row.config(library, **fields[0]), adapter_name="a")
            for name, more in zip("bcd", fields[1:], strict=False):
                model.add_adapter(name, row.config(library, **more))
        made.append(model)
    randomise(made[0])
    copy_adapters(*made)
    return made[0], made[1]


@pytest.mark.parametrize("row", EACH, ids=str)
def test_set_adapter(row: Row) -> None:
    peft_model, our_model = row.pair("a", "b", "c")
    seen = []
    for name in ("a", "b", "c", "b"):
        peft_model.set_adapter(name)
        our_model.set_adapter(name)
        assert our_model.active_adapter == peft_model.active_adapter == name
        assert our_model.active_adapters == peft_model.active_adapters
        assert _trained(our_model) == _trained(peft_model)
        seen.append(outputs_of(our_model(**row.inputs)))
        assert_close(seen[-1], outputs_of(peft_model(**row.inputs)))
    assert_differs(seen[0], seen[1])
    assert_same_bits(seen[1], seen[3])


@pytest.mark.parametrize("row", EACH, ids=str)
def test_gradients_reach_the_active_adapter_alone(row: Row) -> None:
    peft_model, our_model = row.pair("a", "b")
    for model in (peft_model, our_model):
        model.set_adapter("b")
        loss_of(model(**row.inputs)).backward()
    reached = {n for n, p in our_model.named_parameters() if p.grad is not None}
    assert reached == {n for n, p in peft_model.named_parameters() if p.grad is not None}
    assert all(".b." in name or name.endswith(".b") for name in reached)
    assert_close(_gradients(our_model), _gradients(peft_model), rtol=1e-5)


@pytest.mark.parametrize("row", [LINEAR, CONV1D, EMBEDDING, KASA, BDLORA, SEQUENCES], ids=str)
def test_two_active_together(row: Row) -> None:
    peft_model, our_model = row.pair("a", "b", "c")
    for model in (peft_model, our_model):
        model.base_model.set_adapter(["a", "c"])
    assert our_model.active_adapters == peft_model.active_adapters == ["a", "c"]
    assert _trained(our_model) == _trained(peft_model)
    expected, found = peft_model(**row.inputs), our_model(**row.inputs)
    assert_close(outputs_of(found), outputs_of(expected))
    loss_of(expected).backward()
    loss_of(found).backward()
    assert_close(_gradients(our_model), _gradients(peft_model), rtol=1e-5)


def test_adapters_of_unlike_shape_and_sites() -> None:
    fields = (
        {"r": 2, "target_modules": ["q_proj"]},
        {"r": 8, "target_modules": ["v_proj", "down_proj"], "use_rslora": True},
        {"r": 3, "target_modules": ["q_proj"], "use_dora": True, "lora_alpha": 1},
    )
    peft_model, our_model = unlike(LINEAR, *fields)
    assert set(our_model.state_dict()) == set(peft_model.state_dict())
    for name in ("a", "b", "c"):
        peft_model.set_adapter(name)
        our_model.set_adapter(name)
        assert _trained(our_model) == _trained(peft_model)
        assert_close(outputs_of(our_model(**LINEAR.inputs)), outputs_of(peft_model(**LINEAR.inputs)))


@pytest.mark.parametrize("row", EACH, ids=str)
def test_saved_in_folders_of_their_names_and_read_by_the_other(row: Row, tmp_path: Path) -> None:
    peft_model, our_model = row.pair("default", "b")
    with quiet_peft():
        peft_model.save_pretrained(tmp_path / "peft")
    our_model.save_pretrained(tmp_path / "lorakit")
    for part in (".", "b"):
        first, second = (load_file(tmp_path / w / part / "adapter_model.safetensors") for w in ("peft", "lorakit"))
        assert_same_bits(second, {k: v for k, v in first.items() if not k.endswith(".base_layer.weight")})
    with quiet_peft():
        crossed_theirs = theirs.PeftModel.from_pretrained(model_named(row.model), tmp_path / "lorakit")
        crossed_theirs.load_adapter(tmp_path / "lorakit" / "b", "b")
    crossed_ours = ours.PeftModel.from_pretrained(model_named(row.model), tmp_path / "peft")
    crossed_ours.load_adapter(tmp_path / "peft" / "b", "b")
    for name in ("default", "b", "default"):
        peft_model.set_adapter(name)
        expected = outputs_of(peft_model(**row.inputs))
        for model in (crossed_theirs, crossed_ours):
            model.set_adapter(name)
            assert_close(outputs_of(model(**row.inputs)), expected)


@pytest.mark.parametrize("row", [row for row in EACH if row is not KASA], ids=str)  # test_where_peft_is_wrong.py
def test_disabled_is_the_base(row: Row) -> None:
    peft_model, our_model = row.pair("a", "b")
    with torch.no_grad():  # torch takes other kernels where weights want gradients
        plain = outputs_of(model_named(row.model)(**row.inputs))
    with torch.no_grad(), peft_model.disable_adapter(), our_model.disable_adapter():
        assert_same_bits(outputs_of(our_model(**row.inputs)), plain)
        assert_close(outputs_of(peft_model(**row.inputs)), plain)
    assert_close(outputs_of(our_model(**row.inputs)), outputs_of(peft_model(**row.inputs)))


@pytest.mark.parametrize("row", ROUTED, ids=str)
@pytest.mark.parametrize("names", [["a", "b", "__base__"], ["c", "c", "a"], ["__base__", "b", "b"]], ids="-".join)
def test_mixed_batch(row: Row, names: list[str]) -> None:
    peft_model, our_model = row.pair("a", "b", "c")
    assert_close(
        outputs_of(our_model(**row.inputs, adapter_names=names)),
        outputs_of(peft_model(**row.inputs, adapter_names=names)),
    )


def test_mixed_batch_of_copied_heads() -> None:
    peft_model, our_model = HEAD.pair("a", "b")
    names = ["b", "__base__", "a"]
    found = our_model(**HEAD.inputs, adapter_names=names)
    assert_close(outputs_of(found), outputs_of(peft_model(**HEAD.inputs, adapter_names=names)))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("row", ROUTED, ids=str)
def test_generate_with_an_adapter_per_row(row: Row, beams: int) -> None:
    peft_model, our_model = row.pair("a", "b")
    prompt = {"input_ids": row.inputs["input_ids"], "attention_mask": torch.ones_like(row.inputs["input_ids"])}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    names = ["b", "__base__", "a"]
    expected = peft_model.generate(**prompt, **how, adapter_names=names)
    assert torch.equal(our_model.generate(**prompt, **how, adapter_names=names), expected)
    for index, name in enumerate(names):  # one by one
        one = {key: value[index : index + 1] for key, value in prompt.items()}
        alone = our_model.generate(**one, **how, adapter_names=[name])
        assert torch.equal(alone[0], expected[index])
    our_model.set_adapter("b")
    peft_model.set_adapter("b")
    assert torch.equal(our_model.generate(**prompt, **how), peft_model.generate(**prompt, **how))


@pytest.mark.parametrize("row", [LINEAR, CONV1D, DORA], ids=str)
def test_merge_of_several_in_one_call(row: Row) -> None:
    peft_model, our_model = row.pair("a", "b", "c")
    names = ["c", "a"]
    if row is DORA:  # peft merges one DoRA adapter onto the other, so the order counts; ours adds both to the base
        names = ["c"]
    with quiet_peft():
        expected = peft_model.merge_and_unload(adapter_names=names)
    assert_close(our_model.merge_and_unload(adapter_names=names).state_dict(), expected.state_dict(), rtol=2e-6)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_delete_adapter(row: Row) -> None:
    peft_model, our_model = row.pair("a", "b")
    peft_model.delete_adapter("b")
    our_model.delete_adapter("b")
    assert list(our_model.peft_config) == list(peft_model.peft_config) == ["a"]
    assert set(our_model.state_dict()) == set(peft_model.state_dict())
    assert_close(outputs_of(our_model(**row.inputs)), outputs_of(peft_model(**row.inputs)))


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
