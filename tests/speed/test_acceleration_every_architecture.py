"""`accelerate` on every architecture that transformers can build small: it never raises, changes nothing that it does
not undo, and gives the outputs and gradients of the plain model, whatever the call and the settings.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.speed import accelerate
from lorakit.speed.patching import is_replacement

from .architectures import Architecture, NotBuilt, architectures, small, small_settings
from .sweep import Sweep, check_calls, subject, swept
from .sweep_changes import check_changes_afterwards, check_dropout, check_fields, check_implementations
from .sweep_contexts import CONTEXTS, check_contexts

pytestmark = pytest.mark.filterwarnings("ignore")  # some models warn; the comparison decides

EVERY = tuple(architectures())

SAMPLE = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"),
    *("GPTNeoXForCausalLM", "OPTForCausalLM", "FalconForCausalLM", "BloomForCausalLM", "GraniteForCausalLM"),
    *("CohereForCausalLM", "MambaForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "Llama4ForCausalLM"),
    *("BertForMaskedLM", "RobertaForMaskedLM", "ModernBertForMaskedLM", "DistilBertForMaskedLM"),
    *("DebertaV2ForSequenceClassification", "BertForSequenceClassification", "LlamaForSequenceClassification"),
    *("T5ForConditionalGeneration", "BartForConditionalGeneration", "SqueezeBertForMaskedLM"),
)
"""Architectures of `make test`: the fused forwards, and some of each kind that has none."""

FEW = ("LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration")
"""Architectures of `make test` that are compared in all contexts of autograd: one of each fused layer."""

SUPPORTED = 0.9
"""Minimum fraction of the registered classes that can be built small: less would mean that little is tested."""


def held(model: Any) -> dict[str, Any]:
    """Return what `undo` must restore, by identity for objects."""
    modules = list(model.named_modules())
    return {
        "modules": [(path, id(module)) for path, module in modules],
        "attributes": [(path, {k: id(v) for k, v in vars(module).items()}) for path, module in modules],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module in modules],
        "training": [module.training for _, module in modules],
        "buffers": [(name, id(buffer), buffer.clone()) for name, buffer in model.named_buffers()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "random": torch.random.get_rng_state(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return torch.equal(one, other)
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(same, one, other))
        return bool(one == other)

    return [name for name in before if not same(before[name], after[name])]


def check_undo(sweep: Sweep) -> None:
    """Check that `undo` restores everything, whether or not the model was called."""
    model = subject(sweep.architecture, sweep.settings).model
    before = held(model)
    acceleration = accelerate(model, logits=sweep.logits)
    acceleration.undo()
    left = [f"{path} is still a replacement" for path, module in model.named_modules() if is_replacement(module)]
    sweep.failures += [f"undo: {one}" for one in (*changed(before, held(model)), *left)]


FIRST_OF_KIND = {one.kind: one for one in reversed(EVERY)}


def built(architecture: Architecture, *, whole: bool) -> list[Sweep]:
    """Return the sweeps with and without logits; skips architectures that cannot be built small."""
    checks = [check_undo, check_calls, check_dropout]
    without = [check_undo, check_calls]
    if whole:
        checks += [check_contexts, check_implementations, check_changes_afterwards]
        without += [check_contexts]
    if whole and FIRST_OF_KIND[architecture.kind] == architecture:  # the other classes of a config share its layers
        checks.append(check_fields)
    try:
        return [swept(architecture, checks, logits=True), swept(architecture, without, logits=False)]
    except NotBuilt as failed:
        pytest.skip(str(failed))


@pytest.mark.costly(cases=2)
@pytest.mark.parametrize("architecture", [one for one in EVERY if one.name in SAMPLE], ids=lambda one: one.name)
def test_a_sample_of_architectures(architecture: Architecture) -> None:
    for sweep in built(architecture, whole=False):
        assert sweep.compared and not sweep.failures


@pytest.mark.costly
@pytest.mark.parametrize("architecture", [one for one in EVERY if one.name in FEW], ids=lambda one: one.name)
def test_contexts_of_autograd(architecture: Architecture) -> None:
    sweep = swept(architecture, [check_contexts], logits=False)
    assert sweep.compared > len(CONTEXTS) / 2 and not sweep.failures


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EVERY, ids=lambda one: one.name)
def test_every_architecture(architecture: Architecture) -> None:
    for sweep in built(architecture, whole=True):
        assert sweep.compared and not sweep.failures, "\n".join(sweep.failures)


FLOOR = {
    fields[0]: {name: int(count) for name, count in (one.split("=") for one in fields[1:])}
    for line in (Path(__file__).parent / "fused_modules.tsv").read_text(encoding="utf-8").splitlines()[1:]
    for fields in [line.split("\t")]
}
"""Dict from class name to the number of fused modules by kind: a number may only grow."""


def check_floor(architecture: Architecture) -> None:
    try:
        model = small(*architecture)
    except NotBuilt as failed:
        pytest.skip(str(failed))
    found = Counter(name for name, _ in accelerate(model).swaps)
    assert {name: count for name, count in FLOOR[architecture.name].items() if found[name] < count} == {}


@pytest.mark.parametrize("architecture", [one for one in EVERY if one.name in SAMPLE], ids=lambda one: one.name)
def test_a_sample_has_as_many_fused_modules_as_before(architecture: Architecture) -> None:
    check_floor(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [one for one in EVERY if one.name in FLOOR], ids=lambda one: one.name)
def test_every_architecture_has_as_many_fused_modules_as_before(architecture: Architecture) -> None:
    check_floor(architecture)


@pytest.mark.slow
def test_most_architectures_can_be_built() -> None:
    missing = []
    for architecture in EVERY:
        try:
            small_settings(*architecture)
        except NotBuilt as failed:
            missing.append(str(failed))
    assert len(missing) <= (1 - SUPPORTED) * len(EVERY), "\n".join(missing)
