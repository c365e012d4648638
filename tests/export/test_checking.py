"""The verdict on adapters of several variants and settings agrees with what real peft does; what a check reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.export.specimens import (
    SETTINGS,
    VARIANTS,
    WEIGHTS,
    Edit,
    Specimen,
    config,
    fields_of,
    in_lorakit,
    in_peft,
    logits,
    mapped,
    nothing,
    without,
)

from lorakit.choices import RUNTIME_NAMES
from lorakit.errors import AdapterFileError
from lorakit.export.checking import SILENT, check
from lorakit.export.facts import adapter_facts, base_facts
from lorakit.export.rules import FINE, IGNORED, REJECTED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of peft, also of missing tensors
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DAMAGE: dict[str, Edit] = {
    "whole": nothing,
    "half": without("layers.1."),
    "infinite": mapped("lora_A", lambda tensor: tensor / 0),
    "alpha 0": config(lora_alpha=0),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_40_adapters_are_fine_in_peft_and_equal_ours(tmp_path: Path, variant: str, setting: str) -> None:
    specimen = Specimen(fields_of(variant, setting))
    base, adapter, expected = specimen.write(tmp_path)
    verdict = check(adapter_facts(adapter, base_facts(str(base))), ["peft"]).verdict("peft")
    theirs = in_peft(specimen, adapter)
    assert (theirs - logits(specimen.model())).abs().max() > 1e-3
    assert (verdict is FINE) == bool((theirs - expected).abs().max() < 1e-5)
    assert verdict is FINE
    assert (theirs - in_lorakit(specimen, adapter)).abs().max() < 1e-5


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("variant", ["lora", "velora", "dora", "pissa"])
def test_damage_is_seen_in_every_variant(tmp_path: Path, variant: str, damage: str) -> None:
    specimen = Specimen(fields_of(variant, "plain"), DAMAGE[damage])
    base, adapter, expected = specimen.write(tmp_path)
    verdict = check(adapter_facts(adapter, base_facts(str(base))), ["peft"]).verdict("peft")
    theirs = in_peft(specimen, adapter)
    is_right = bool((theirs - expected).abs().max() < 1e-5)
    assert (verdict is FINE, verdict in SILENT) == (is_right, not is_right)
    assert is_right == (damage == "whole")


def test_the_worst_effect_is_the_verdict_and_comes_first(tmp_path: Path) -> None:
    specimen = Specimen({"use_rslora": True, "alpha_pattern": {"q_proj": 2}, "r": 32})
    _, adapter, _ = specimen.write(tmp_path)
    found = check(adapter_facts(adapter), RUNTIME_NAMES)
    effects = {name: [match.rule.effect for match in matches] for name, matches in found.matches.items()}
    assert effects["sglang"] == [IGNORED, IGNORED, REJECTED]
    assert effects["vllm"] == [REJECTED, FINE, FINE]
    assert found.verdict("sglang") is IGNORED and found.verdict("vllm") is REJECTED and found.verdict("peft") is FINE
    assert found.is_silent and not check(adapter_facts(adapter), ["vllm", "peft", "mlx"]).is_silent


def test_what_needs_the_base_is_named_if_there_is_none(tmp_path: Path) -> None:
    base, adapter, _ = Specimen().write(tmp_path)
    assert "rope parameters" in check(adapter_facts(adapter), ["mlx"]).not_compared
    assert "rope parameters" not in check(adapter_facts(adapter), ["vllm"]).not_compared
    assert check(adapter_facts(adapter, base_facts(str(base))), RUNTIME_NAMES).not_compared == ()


@pytest.mark.parametrize(("rank", "limit"), [(4, 8), (8, 8), (9, 16), (200, 256), (600, 512)])
def test_the_remedy_for_a_rank_is_a_value_that_vllm_accepts(tmp_path: Path, rank: int, limit: int) -> None:
    _, adapter, _ = Specimen({"r": 4, "rank_pattern": {"layers.0.mlp.down_proj": rank}}).write(tmp_path)
    found = check(adapter_facts(adapter, max_rank=1), ["vllm"]).matches["vllm"]
    assert f"--max-lora-rank {limit}," in next(match.remedy for match in found if match.condition == "rank")


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    _, adapter, _ = Specimen().write(tmp_path)
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(AdapterFileError) as caught:
        adapter_facts(adapter)
    assert caught.value.where == str(adapter / WEIGHTS)
