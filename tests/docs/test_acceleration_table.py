"""The table of architectures in docs/accelerate.md is the one that the script makes with the installed transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..loading import load

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "accelerate.md"


GENERATED = load("scripts/generated_table.py")


@pytest.fixture(scope="module")
def script() -> Any:
    return load("scripts/acceleration_table.py")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_current(script: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert GENERATED.with_table(page, script.BEGIN, script.table()) == page


def test_a_table_replaces_the_one_between_the_markers(script: Any) -> None:
    page = f"before\n{script.BEGIN}\n\nold\n{GENERATED.END}\nafter\n"
    assert (
        GENERATED.with_table(page, script.BEGIN, "new\n")
        == f"before\n{script.BEGIN}\n\nnew\n\n{GENERATED.END}\nafter\n"
    )


def test_class_names_are_without_the_name_of_the_model(script: Any) -> None:
    assert script.prefix_of("Qwen2MoeForCausalLM") == "Qwen2Moe"
    assert script.grouped(["GPT2LMHeadModel", "AForX", "GPT2ForX"]) == "GPT2 (LMHeadModel, ForX), A (ForX)"
    assert script.short("Qwen2MLP: unknown, Qwen2MoeBlock", "Qwen2Moe") == "Qwen2MLP: unknown, Block"


def test_measured_figures_are_left_out(script: Any) -> None:
    assert script.short("MLP: a probe differs by 1.2e-03 (relative)", "Llama") == "MLP: a probe differs"


@pytest.mark.filterwarnings("ignore")
def test_rows_of_known_architectures(script: Any) -> None:
    from tests.speed.architectures import architectures, small_settings
    from tests.speed.sweep import subject

    known = {one.name: one for one in architectures()}
    rows = {}
    for name in ("LlamaForCausalLM", "MambaForCausalLM"):
        rows[name] = script.row_of(subject(known[name], small_settings(*known[name])).model, script.prefix_of(name))
    assert "decoder layer (DecoderLayer)" in rows["LlamaForCausalLM"].fused
    assert not rows["LlamaForCausalLM"].linear
    assert rows["MambaForCausalLM"].linear == "Mixer"
    assert "Block: " in rows["MambaForCausalLM"].own
