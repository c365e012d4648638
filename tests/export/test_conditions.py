"""Each condition holds for an adapter that real peft wrote for it, and not for a plain one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests import small_models
from tests.export.specimens import SPECIMENS, Specimen, added_tokens

from lorakit.export.conditions import CONDITIONS
from lorakit.export.facts import AdapterFacts, adapter_facts, base_facts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ALWAYS = {"any adapter", "rope parameters"}
"""Conditions that hold for every adapter on the base of the tests."""


def facts_of(specimen: Specimen, folder: Path, max_rank: int = 16) -> AdapterFacts:
    base, adapter, _ = specimen.write(folder)
    return adapter_facts(adapter, base_facts(str(base)), max_rank)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> AdapterFacts:
    return facts_of(Specimen(), tmp_path_factory.mktemp("plain"))


def test_tied_weights_of_any_name(tmp_path: Path) -> None:
    facts = facts_of(Specimen({"target_modules": ["wte"]}, trained_on="gpt2", served_on="gpt2"), tmp_path)
    assert CONDITIONS["tied embedding"].find(facts) and not CONDITIONS["tied head"].find(facts)


def test_tokens_of_transformers_5_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokens = [f"<{number}>" for number in range(small_models.VOCABULARY)]
    facts = facts_of(Specimen(edit=added_tokens(*tokens)), tmp_path)
    assert CONDITIONS["new tokens"].find(facts) == "the tokenizer adds 1 token to a vocabulary of 61"
    own = replace(facts, base=replace(facts.base, added_tokens=facts.added_tokens))
    assert not CONDITIONS["new tokens"].find(own) and not CONDITIONS["tokenizer"].find(own)


def test_each_condition_has_an_adapter() -> None:
    assert list(SPECIMENS) == list(CONDITIONS)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_holds_for_its_adapter_and_not_for_a_plain_one(
    tmp_path: Path, plain: AdapterFacts, name: str
) -> None:
    facts = facts_of(SPECIMENS[name], tmp_path, max_rank=24 if name == "rank value" else 16)
    evidence = CONDITIONS[name].find(facts)
    assert evidence and "{" not in evidence
    assert (CONDITIONS[name].find(plain) == "") == (name not in ALWAYS)
