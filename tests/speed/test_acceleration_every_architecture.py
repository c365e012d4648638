"""`accelerate` on every architecture that transformers can build small: it never raises, changes nothing that it does
not undo, and gives the outputs and gradients of the plain model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.speed import accelerate
from lorakit.speed.patching import is_replacement

from .architectures import architectures, inputs, small

NAMED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "moshi", "squeezebert", "inkling_text", "cpmant", "git")
"""Architectures on which a probe raises, or a forward with labels."""

LEAST_BUILT, LEAST_FAST = 200, 150
"""Minimum number of models built, and of models with some fused forward: fewer would mean that nothing is tested."""

LENGTHS = (1, 9, 24)
BOUND = 2e-4


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


def answer(model: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Return logits, or another first tensor of the output, and the gradient of the input embeddings."""
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    weight.grad = None
    output = model(**inputs(model, tokens))
    made = next(v for v in (output.get("logits"), *output.values()) if isinstance(v, Tensor))
    (made.float() * torch.linspace(-1, 1, made.numel()).view(made.shape)).sum().backward()
    weight.requires_grad_(False)
    return made.detach(), weight.grad


def answers(model: Any) -> list[Tensor]:
    """Return the outputs at those lengths that the model supports."""
    found = []
    for tokens in LENGTHS:
        try:
            found += answer(model, tokens)
        except (RuntimeError, ValueError, IndexError):  # the model may not support this length
            found += [torch.zeros(0), torch.zeros(0)]
    return found


def checked(model: Any, logits: bool) -> tuple[int, list[str]]:
    """Return the number of modules with a fused forward, and everything that is wrong."""
    before = held(model)
    acceleration = accelerate(model, logits=logits)
    found = len(acceleration.swaps)
    acceleration.undo()
    wrong = [f"undo: {one}" for one in changed(before, held(model))]
    acceleration = accelerate(model, logits=logits)
    ours = answers(model)
    acceleration.undo()
    wrong += [
        f"undo: {path} is still a replacement" for path, module in model.named_modules() if is_replacement(module)
    ]
    for target, (one, wanted) in enumerate(zip(ours, answers(model), strict=True)):
        error = float((one - wanted).norm()) / max(float(wanted.norm()), 1e-12) if one.shape == wanted.shape else 1.0
        if not error <= BOUND:
            wrong.append(f"{('output', 'gradient')[target % 2]} at {LENGTHS[target // 2]} tokens: {error:.1e}")
    model.train().requires_grad_(True)
    output = model(**inputs(model, 9))
    next(v for v in output.values() if isinstance(v, Tensor)).float().sum().backward()
    model.eval().requires_grad_(False)
    return found, wrong


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("kind", NAMED)
def test_a_part_whose_probe_raises_keeps_its_own_forward(kind: str, logits: bool) -> None:
    model = small(*next(one for one in architectures() if one[0] == kind))
    found, wrong = checked(model, logits)
    assert found and not wrong


@pytest.mark.slow
def test_every_architecture() -> None:
    built, fast, skipped, wrong = set[str](), set[str](), dict[str, str](), dict[str, list[str]]()
    for kind, name in architectures():
        if name in built:
            continue
        try:
            model = small(kind, name)
        except Exception as failed:  # noqa: BLE001 - this test is of those that can be built
            skipped[name] = f"{type(failed).__name__}: {failed}"
            continue
        built.add(name)
        for logits in (True, False):
            try:
                found, said = checked(model, logits)
            except Exception as failed:  # noqa: BLE001 - all failures are reported at once
                found, said = 0, [f"{type(failed).__name__}: {failed}"]
            fast |= {name} if found else set()
            wrong |= {f"{name} logits={logits}": said} if said else {}
    assert not wrong, wrong
    assert len(built) >= LEAST_BUILT and len(fast) >= LEAST_FAST, (len(built), len(fast), skipped)
