"""Models with experts: lorakit trains, computes and stores what the installed peft does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit.peft as ours
from lorakit import core

from .experts import (
    FAMILIES,
    Family,
    each,
    gradients,
    loss_and_logits,
    pair,
    quiet,
    theirs,
    trained,
    wrapped,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BARE = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CONVERTED = tuple(family for family in FAMILIES if family.old)


def targets_of(family: Family, way: str) -> dict[str, Any]:
    """Return the targets of a config: "all-linear", names of transformers 4, or parameters."""
    if way == "old names":
        return {"target_modules": ["q_proj", "o_proj", *family.old]}
    return BARE if way == "parameters" else {"target_modules": way}


ALL = [(family, way) for family in FAMILIES for way in ("all-linear", "old names", "parameters")]
WAYS = [pytest.param(*p.values, way, id=f"{p.id}-{way}", marks=p.marks) for p in each(FAMILIES) for way in
        ("all-linear", "old names", "parameters") if p.values[0].old or way != "old names"]  # fmt: skip


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_the_trained_tensors_and_the_results_are_those_of_peft(family: Family, way: str) -> None:
    peft_model, our_model = pair(family, **targets_of(family, way))
    assert trained(our_model) == trained(peft_model)
    for is_training in (False, True):
        found, expected = [loss_and_logits(model.train(is_training)) for model in (our_model, peft_model)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    found, expected = gradients(our_model), gradients(peft_model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # Relative to the tensor: the recurrence of qwen3_next makes one rounding of a weight 3e-5 of its gradient.
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_files_are_read_by_both(family: Family, way: str, tmp_path: Path) -> None:
    peft_model, our_model = pair(family, **targets_of(family, way))
    _, expected = loss_and_logits(peft_model)
    with quiet():
        peft_model.save_pretrained(tmp_path / "theirs")
        our_model.save_pretrained(tmp_path / "ours")
        plain = family.model()
        core.load_adapter(plain, tmp_path / "theirs")
        readers = [
            plain,
            ours.PeftModel.from_pretrained(family.model(), tmp_path / "theirs"),
            theirs.PeftModel.from_pretrained(family.model(), tmp_path / "ours"),
        ]
    for reader in readers:
        torch.testing.assert_close(loss_and_logits(reader.eval())[1], expected, **CLOSE)


@pytest.mark.parametrize("family", each(CONVERTED))
def test_the_fused_weight_has_the_factors_of_both_parts(family: Family) -> None:
    config = wrapped(ours, family, **targets_of(family, "old names")).peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 6)
    assert config.rank_pattern == {r".*\.gate_up_proj": 4}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 12}
