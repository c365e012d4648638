"""`ensure_weight_tying`: saved copies, factors and rows of tied modules stay tied in the model, on disk and after a merge."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.core import (
    attach,
    detach,
    disable,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    save_adapter,
    sites,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.core.model.ties import LEFT_ALONE, NOTHING_TIED
from lorakit.core.model.ties import TIED as SAID
from lorakit.errors import AdapterFileError, ConfigError, MergeError

from ...laws.snapshots import same_bits
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import GPT2, LLAMA, TIED, output, randomise, run
from ..through_peft import through_peft

FP32 = torch.float32
GIVEN = TIED.given()
COPIED = {"modules_to_save": ["embed_tokens"]}
TARGETED = {"target_modules": ["embed_tokens", "q_proj"]}
WAYS = pytest.mark.parametrize(
    "fields", [COPIED, {"modules_to_save": ["lm_head"]}, TARGETED, {"target_modules": ["lm_head", "q_proj"]}], ids=str
)


def tied(fields: dict[str, Any], name: str = "a", seed: int = 5) -> nn.Module:
    model = TIED.model()
    attach(model, TIED.config(ensure_weight_tying=True, **fields), name)
    randomise(model, name, seed)
    return model


def effective(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The table as it looks up, and as it reads out, (V, d) each."""
    with torch.no_grad():
        looked = model.get_input_embeddings()(torch.arange(50))
        return looked, model.get_output_embeddings()(torch.eye(16)).T


@WAYS
def test_both_act_as_one(fields: dict[str, Any]) -> None:
    model = tied(fields)
    looked, read = effective(model)
    assert_close(read, looked, FP32)
    assert_differs(looked, effective(TIED.model())[0], FP32)
    with disable(model):
        assert same_bits(run(model, GIVEN), run(TIED.model(), GIVEN))
    shapes = [tuple(p.shape) for n, p in trainable_parameters(model, "a") if "embed_tokens" in n or "lm_head" in n]
    assert shapes in ([(50, 16)], [(4, 50), (16, 4)])
    fresh = TIED.model()
    attach(fresh, TIED.config(ensure_weight_tying=True, **fields))
    assert same_bits(run(fresh, GIVEN), run(TIED.model(), GIVEN))


@WAYS
def test_training_keeps_them_one(fields: dict[str, Any]) -> None:
    model = tied(fields)
    before = effective(model)[0]
    optimizer = torch.optim.SGD([p for _, p in trainable_parameters(model, "a")], lr=0.1)
    output(model, GIVEN).pow(2).mean().backward()
    optimizer.step()
    looked, read = effective(model)
    assert_close(read, looked, FP32)
    assert not same_bits(looked, before)


@WAYS
def test_saved_and_loaded_by_both(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tied(fields)
    wanted = run(model, GIVEN)
    save_adapter(model, tmp_path / "ours", "a")
    names = set(load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    for target in ("model.embed_tokens", "lm_head"):
        assert any(name.startswith(f"base_model.model.{target}.") for name in names)
    fresh = TIED.model()
    load_adapter(fresh, tmp_path / "ours", "x", trainable=True)
    assert same_bits(run(fresh, GIVEN), wanted)
    looked, read = effective(fresh)
    assert_close(looked, read, FP32)
    _, again = through_peft(tmp_path, TIED.model, lambda made: run(made, GIVEN), wanted)
    assert_close(*effective(again), FP32)
    twin = copy.deepcopy(again)
    detach(again)
    assert_close(*effective(twin), FP32)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@WAYS
@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merge_keeps_them_tied(fields: dict[str, Any], keep_base: bool) -> None:
    plain = TIED.model().state_dict()
    model = tied(fields)
    wanted, tensors = run(model, GIVEN), merged_state_dict(model, "a")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    with disable(model):
        base = run(model, GIVEN)
    merge(model, "a", keep_base=keep_base)
    assert_close(run(model, GIVEN), wanted, FP32)
    assert_close(*effective(model), FP32)
    if keep_base:
        with disable(model):
            assert same_bits(run(model, GIVEN), base)
        unmerge(model, "a")
        assert same_bits(run(model, GIVEN), wanted)
        detach(model)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())
    done = tied(fields)
    merge_and_unload(done, "a")
    assert done.lm_head.weight is done.model.embed_tokens.weight
    assert_close(run(done, GIVEN), wanted, FP32)
    fresh = TIED.model(seed=9)
    fresh.load_state_dict(tensors)
    assert_close(run(fresh, GIVEN), wanted, FP32)


def test_two_adapters_that_are_tied() -> None:
    model = tied(TARGETED)
    attach(model, TIED.config(ensure_weight_tying=True, **TARGETED), "b")
    randomise(model, "b", 8)
    with use(model, "a", "b"):
        both = run(model, GIVEN)
    with use(model, "b"):
        other = run(model, GIVEN)
    merge(model, "a")
    merge(model, "b")
    with use(model, "a", "b"):
        assert_close(run(model, GIVEN), both, FP32)
    unmerge(model, "a")
    with use(model, "b"):
        assert_close(run(model, GIVEN), other, FP32)
    assert len([site for site in sites(model) if site.path in {"lm_head", "model.embed_tokens"}]) == 2


def test_what_is_said_without_it() -> None:
    for fields, text in (
        (COPIED, "lm_head keeps the base weight"),
        (TARGETED, "lm_head keeps"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "are trained separately"),
    ):
        model = TIED.model()
        report = attach(model, TIED.config(**fields))
        assert any(note.text.startswith(SAID) and text in note.text for note in report.notes)
        randomise(model, "default", 1)
        with pytest.raises(MergeError, match=r"shares its weight with .*untie=True"):
            merge(model)
        wanted = run(model, GIVEN)
        merge_and_unload(model, untie=True)
        assert_close(run(model, GIVEN), wanted, FP32)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not any(note.kind == LEFT_ALONE for note in attach(TIED.model(), TIED.config()).notes)
    assert not any(note.kind == LEFT_ALONE for note in attach(LLAMA.model(), LLAMA.config(**COPIED)).notes)


def test_where_nothing_is_tied_it_is_said() -> None:
    report = attach(LLAMA.model(), LLAMA.config(ensure_weight_tying=True))
    assert any("no tied modules were found in the model" in note.text for note in report.notes)
    report = attach(TIED.model(), TIED.config(ensure_weight_tying=True))
    text = "no tied modules are added in either `modules_to_save` or `target_modules`"
    assert any(note.kind == NOTHING_TIED and text in note.text for note in report.notes)
    report = attach(GPT2.model(), GPT2.config(ensure_weight_tying=True, target_modules=["wte", "c_attn"]))
    assert not any(note.kind == NOTHING_TIED for note in report.notes)


def test_rows_of_tied_tables() -> None:
    words = {"ensure_weight_tying": True, "trainable_token_indices": {"lm_head": [1], "embed_tokens": [3]}}
    with pytest.raises(ConfigError, match="Cannot ensure weight tying when different token indices are specified"):
        attach(TIED.model(), TIED.config(**words))
    with pytest.warns(UserWarning, match="ensure_weight_tying=True but the model does not have tied weights"):
        attach(LLAMA.model(), LLAMA.config(ensure_weight_tying=True, trainable_token_indices=[1]))


def test_what_cannot_be_tied(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ensure_weight_tying") as caught:
        attach(TIED.model(), TIED.config(ensure_weight_tying=True, use_dora=True, **TARGETED))
    assert caught.value.field == "use_dora"
    save_adapter(tied(TARGETED), tmp_path, "a")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with (
        warnings.catch_warnings(),
        pytest.raises(AdapterFileError, match=r"untied base_model.model.lm_head.lora_A.weight"),
    ):
        warnings.simplefilter("ignore")
        load_adapter(TIED.model(), tmp_path)


def test_a_short_name_takes_no_longer_one() -> None:
    """PEFT takes `lm_head` for `head`; here an entry names whole words of a path."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.lm_head, self.lin = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lin(x)) + self.lm_head(x)

    from lorakit import LoraConfig

    model = Two()
    attach(model, LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head"]))
    assert hasattr(model.head, "modules_to_save")
    assert not hasattr(model.lm_head, "modules_to_save")
    theirs = peft.get_peft_model(Two(), peft.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head"]))
    assert hasattr(theirs.base_model.model.lm_head, "modules_to_save")


def test_the_config_that_was_given_is_not_changed(tmp_path: Path) -> None:
    config = TIED.config(ensure_weight_tying=True, modules_to_save=["lm_head"])
    model = TIED.model()
    attach(model, config)
    assert config.modules_to_save == ["lm_head"]
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
