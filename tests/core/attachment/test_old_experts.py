"""Adapters made under transformers 4, where each expert was a module: they load as peft loads them, or raise an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit import core
from lorakit.errors import AdapterFileError, ShapeMismatchError

from ...peft.experts import (
    BY_KIND,
    FAMILIES,
    Family,
    each,
    loss_and_logits,
    old_tensors,
    quiet,
    theirs,
    write_old,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MIXTRAL, QWEN = BY_KIND["mixtral"], BY_KIND["qwen3_moe"]
OLD = tuple(family for family in FAMILIES if family.old)


def loaded(family: Family, folder: Path, **options: Any) -> tuple[Any, core.LoadReport]:
    """Return a small model with an adapter from a directory, and the report."""
    model = family.model()
    with quiet():
        return model, core.load_adapter(model, folder, **options)


def state(model: Any) -> dict[str, Tensor]:
    """Return a copy of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", each(OLD))
def test_an_old_adapter_loads_as_in_peft(family: Family, tmp_path: Path) -> None:
    folder = write_old(tmp_path, old_tensors(family), target_modules=["q_proj", *family.old])
    with quiet():
        expected = theirs.PeftModel.from_pretrained(family.model(), folder).eval()
    model, _ = loaded(family, folder)
    for found, wanted in zip(loss_and_logits(model), loss_and_logits(expected), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", [MIXTRAL, QWEN], ids=str)
def test_each_expert_has_its_own_update(family: Family, rslora: bool, tmp_path: Path) -> None:
    tensors = old_tensors(family)
    folder = write_old(tmp_path, tensors, target_modules=["q_proj", *family.old], use_rslora=rslora)
    model, _ = loaded(family, folder)
    base = state(family.model())
    core.merge(model)
    scale = 6 / (2**0.5 if rslora else 2)
    gate, up, down = ("w1", "w3", "w2") if family is MIXTRAL else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if family is MIXTRAL else "mlp"
    merged = dict(model.named_modules())["model.layers.1.mlp.experts"]
    for number in range(4):
        at = f"base_model.model.model.layers.1.{block}.experts.{number}"
        delta = {
            old: scale * tensors[f"{at}.{old}.lora_B.weight"] @ tensors[f"{at}.{old}.lora_A.weight"]
            for old in (gate, up, down)
        }
        wanted = base["model.layers.1.mlp.experts.gate_up_proj"][number] + torch.cat([delta[gate], delta[up]])
        owner = merged
        while not hasattr(owner, "gate_up_proj") or not isinstance(owner.gate_up_proj, Tensor):
            owner = owner.base_layer
        torch.testing.assert_close(owner.gate_up_proj[number], wanted, **CLOSE)
        wanted = base["model.layers.1.mlp.experts.down_proj"][number] + delta[down]
        torch.testing.assert_close(owner.down_proj[number], wanted, **CLOSE)


def test_it_can_be_saved_and_loaded_again_by_both(tmp_path: Path) -> None:
    folder = write_old(tmp_path / "old", old_tensors(QWEN), target_modules=["q_proj", *QWEN.old])
    model, _ = loaded(QWEN, folder)
    expected = loss_and_logits(model)[1]
    core.save_adapter(model, tmp_path / "new")
    again, _ = loaded(QWEN, tmp_path / "new")
    with quiet():
        of_peft = theirs.PeftModel.from_pretrained(QWEN.model(), tmp_path / "new").eval()
    for reader in (again, of_peft):
        torch.testing.assert_close(loss_and_logits(reader)[1], expected, **CLOSE)


def test_modules_with_an_old_name_that_are_not_experts_load(tmp_path: Path) -> None:
    family, tensors = BY_KIND["deepseek_v3"], old_tensors(BY_KIND["deepseek_v3"])
    shape = {"A": (2, 32), "B": (48, 2)}
    dense = "base_model.model.model.layers.0.mlp.gate_proj"
    tensors |= {f"{dense}.lora_{part}.weight": torch.ones(size) for part, size in shape.items()}
    model, report = loaded(family, write_old(tmp_path, tensors, target_modules=["q_proj", *family.old]))
    assert "model.layers.0.mlp.gate_proj" in {site.path for site in core.sites(model)}
    assert report.warnings == () or all("gate_proj" not in message for message in report.warnings)


def test_different_ranks_with_one_scale_load(tmp_path: Path) -> None:
    tensors = old_tensors(QWEN)
    for name, tensor in tensors.items():
        if ".up_proj." in name:
            tensors[name] = torch.cat([tensor, tensor], 0 if "lora_A" in name else 1)
    fields = {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 12}}
    model, _ = loaded(QWEN, write_old(tmp_path, tensors, target_modules=["q_proj", *QWEN.old], **fields))
    ranks = {
        site.path.partition("mlp.")[2]: site.layer.r["default"] for site in core.sites(model) if "mlp" in site.path
    }
    assert ranks["experts.base_layer"] == 6 and ranks["experts"] == 2


def test_layers_may_have_different_ranks(tmp_path: Path) -> None:
    tensors = old_tensors(QWEN)
    for name, tensor in tensors.items():
        if ".layers.1.mlp.experts." in name:
            tensors[name] = torch.cat([tensor, tensor], 0 if "lora_A" in name else 1)
    model, _ = loaded(QWEN, write_old(tmp_path / "old", tensors, target_modules=["q_proj", *QWEN.old]))
    ranks = {site.path: site.layer.r["default"] for site in core.sites(model) if "experts" in site.path}
    assert sorted(ranks.values()) == [2, 4, 4, 8]
    expected = loss_and_logits(model)[1]
    core.save_adapter(model, tmp_path / "new")
    with quiet():
        of_peft = theirs.PeftModel.from_pretrained(QWEN.model(), tmp_path / "new").eval()
    for reader in (loaded(QWEN, tmp_path / "new")[0], of_peft):
        torch.testing.assert_close(loss_and_logits(reader)[1], expected, **CLOSE)


def test_dropout_at_a_router_is_reported(tmp_path: Path) -> None:
    folder = write_old(tmp_path, old_tensors(QWEN), target_modules=["q_proj", *QWEN.old], lora_dropout=0.1)
    _, report = loaded(QWEN, folder)
    assert any("lora_dropout" in message for message in report.warnings)


def test_a_pattern_in_the_file_is_not_run(tmp_path: Path) -> None:
    folder = write_old(
        tmp_path, old_tensors(QWEN), target_modules=r"(.*a+)+.*(gate_proj|up_proj|down_proj|gate|q_proj)"
    )
    model, report = loaded(QWEN, folder)
    assert report.sites == len(core.sites(model)) == 2 * 4


EXPERT = "base_model.model.model.layers.0.mlp.experts"


def without(tensors: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    """Return the tensors without those whose names contain a word."""
    return {name: tensor for name, tensor in tensors.items() if word not in name}


def renumbered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a fifth expert."""
    extra = {name.replace("experts.3.", "experts.4."): t.clone() for name, t in tensors.items() if "experts.3." in name}
    return tensors | extra


def changed(tensors: dict[str, Tensor], part: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return the tensors with another shape of one of them."""
    return tensors | {f"{EXPERT}.1.down_proj.{part}": torch.ones(size)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: without(t, "layers.0.mlp.experts.2."), AdapterFileError, "lacks expert 2"),
        (lambda t: without(t, "layers.0.mlp.experts.2.up_proj"), AdapterFileError, "lacks expert 2"),
        (lambda t: without(t, ".up_proj."), AdapterFileError, "up_proj"),
        (lambda t: without(t, "experts.1.down_proj.lora_B"), AdapterFileError, "A and B"),
        (renumbered, AdapterFileError, "expert 4"),
        (lambda t: changed(t, "lora_A.weight", (2, 17)), ShapeMismatchError, "shapes"),
        (lambda t: changed(t, "lora_B.weight", (32, 3)), ShapeMismatchError, "fit"),
        (lambda t: t | {f"{EXPERT}.0.w9.lora_A.weight": torch.ones(2, 2)}, AdapterFileError, "w9"),
        (lambda t: t | {f"{EXPERT}.0.up_proj.lora_magnitude_vector": torch.ones(16)}, AdapterFileError, "magnitude"),
        (
            lambda t: {name.replace("layers.1", "layers.9"): one for name, one in t.items()},
            AdapterFileError,
            "layers.9",
        ),
    ],
)
def test_experts_that_do_not_fit_change_nothing(
    change: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    folder = write_old(tmp_path, change(old_tensors(QWEN)), target_modules=["q_proj", *QWEN.old])
    model = QWEN.model()
    before = state(model)
    with quiet(), pytest.raises(error, match=words):
        core.load_adapter(model, folder)
    after = state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_parts_with_different_scales_are_an_error(tmp_path: Path) -> None:
    fields = {"alpha_pattern": {"up_proj": 60}}
    folder = write_old(tmp_path, old_tensors(QWEN), target_modules=["q_proj", *QWEN.old], **fields)
    with pytest.raises(AdapterFileError, match="scales"):
        loaded(QWEN, folder)


def test_the_file_is_not_changed(tmp_path: Path) -> None:
    folder = write_old(tmp_path, old_tensors(QWEN), target_modules=["q_proj", *QWEN.old])
    before = json.loads((folder / "adapter_config.json").read_text())
    loaded(QWEN, folder)
    assert json.loads((folder / "adapter_config.json").read_text()) == before
