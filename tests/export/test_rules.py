"""The rules about runtimes: every condition has a rule, and what real peft does is what its rules say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import peft
import pytest
from tests.export.specimens import SPECIMENS, Specimen, in_peft, logits
from tests.gguf_models import write_base
from torch import Tensor

from lorakit.choices import RUNTIME_NAMES
from lorakit.cli import COMMANDS, main
from lorakit.export.checking import check
from lorakit.export.conditions import CONDITIONS
from lorakit.export.facts import adapter_facts, base_facts
from lorakit.export.rules import FINE, IGNORED, REJECTED, REMEDIES, RUN, RUNTIMES, SOURCE, THREAD, WRONG, Effect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of peft, also of missing tensors
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

READ_PEFT = ("vllm", "sglang", "llama.cpp", "peft")
ELSEWHERE = {"any adapter", "rank value", "architecture", "rope parameters"}
"""Conditions that concern some of these runtimes only."""


def observed(specimen: Specimen, adapter: Path, expected: Tensor) -> Effect:
    """Return what real peft does with an adapter, in comparison with the base and with what it was made for."""
    try:
        theirs = in_peft(specimen, adapter)
    except Exception:  # noqa: BLE001 - any error of peft is a rejection
        return REJECTED
    if (theirs - logits(specimen.model())).abs().max() < 1e-7:
        return IGNORED
    return FINE if theirs.shape == expected.shape and (theirs - expected).abs().max() < 1e-5 else WRONG


def test_the_runtimes_are_those_of_the_flag() -> None:
    assert tuple(RUNTIMES) == RUNTIME_NAMES
    assert RUNTIMES["peft"].version == peft.__version__


@pytest.mark.parametrize("runtime", READ_PEFT)
def test_every_condition_has_a_rule(runtime: str) -> None:
    rules = RUNTIMES[runtime].rules
    assert set(CONDITIONS) - ELSEWHERE <= set(rules) <= set(CONDITIONS)


def test_every_rule_names_its_source_and_a_known_remedy() -> None:
    for runtime in RUNTIMES.values():
        for name, rule in runtime.rules.items():
            assert name in CONDITIONS
            assert re.search(r"\w\.(py|h|cpp)\b|#\d+|/|\w{4,}", rule.source)
            assert rule.known in (RUN, SOURCE, THREAD)
            assert rule.remedy in ("", *REMEDIES)
            assert bool(rule.remedy) == (rule.effect in (REJECTED, IGNORED, WRONG))


def test_remedies_are_commands_and_formats_of_lorakit() -> None:
    for text in REMEDIES.values():
        assert set(re.findall(r"lorakit ([\w-]+)", text)) <= set(COMMANDS)


COMMANDS_OF = {name for name in SPECIMENS if name != "new tokens"}  # which needs a tokenizer


@pytest.mark.parametrize("name", sorted(COMMANDS_OF))
def test_remedies_run_as_printed(tmp_path: Path, name: str) -> None:
    base, adapter, _ = SPECIMENS[name].write(tmp_path)
    facts = adapter_facts(adapter, base_facts(str(base)), 24 if name == "rank value" else 16)
    matches = [one for found in check(facts, RUNTIME_NAMES).matches.values() for one in found if one.condition == name]
    for number, remedy in enumerate(dict.fromkeys(one.remedy for one in matches if one.remedy.startswith("lorakit "))):
        command = remedy.partition(", and ")[0].replace("OUTPUT", str(tmp_path / f"out-{number}"))
        if "BASE.gguf" in command:
            write_base(SPECIMENS[name].model(), tmp_path / "BASE.gguf")
        words = shlex.split(command.replace("BASE.gguf", str(tmp_path / "BASE.gguf")).replace("MODEL", str(base)))
        assert main(words[1:]) == 0, remedy


OBSERVED = {name for name, rule in RUNTIMES["peft"].rules.items() if rule.known == RUN}


@pytest.mark.parametrize("name", sorted(OBSERVED))
def test_real_peft_does_what_its_rule_says(tmp_path: Path, name: str) -> None:
    specimen = SPECIMENS[name]
    base, adapter, expected = specimen.write(tmp_path)
    found = check(adapter_facts(adapter, base_facts(str(base))), ["peft"])
    assert name in [match.condition for match in found.matches["peft"]]
    assert observed(specimen, adapter, expected) is found.verdict("peft") is RUNTIMES["peft"].rules[name].effect
