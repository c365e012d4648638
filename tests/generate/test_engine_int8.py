"""Generation on a base whose linear layers are in int8: cached steps, mixed adapters, and accelerated models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lorakit
from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core import Int8Linear
from lorakit.generate import NewToken, generate, generate_batch
from lorakit.ops import int8
from lorakit.ops.kernels import compiled

KERNELS = compiled.kernels()
pytestmark = pytest.mark.skipif(bool(int8.why_no_int8_matmuls()), reason="the processor has no int8 units")
PROMPTS = [[5, 17, 200, 3], [9], [44, 45, 46, 47, 48, 49, 50], [300, 2, 300]]
TOKENS = 8


@pytest.fixture(params=["quantized", "accelerated"])
def model(tiny_llama: Any, request: pytest.FixtureRequest) -> Any:
    """Return a small int8 model with two adapters, with weights large enough that it does not repeat one token."""
    with torch.no_grad():
        for name, parameter in tiny_llama.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                parameter.mul_(12)
    tiny_llama.requires_grad_(False)
    for seed, name in enumerate(("one", "two")):
        core.attach(tiny_llama, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"), name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in core.trainable_parameters(tiny_llama, name):
            if "lora_B" in path:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    made, batches = tiny_llama.eval(), [{"input_ids": torch.arange(64).view(2, 32)}]
    if request.param == "quantized":
        core.quantize_base(made, batches)
    else:
        lorakit.accelerate(made, base_matmul="int8", calibration=batches)
    assert any(isinstance(module, Int8Linear) for module in made.modules())
    return made


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row counts of the calls of the kernel for few rows."""
    found, real = list[int](), int8.few_rows

    def counted(x: Any, *others: Any) -> Any:
        y = real(x, *others)
        found.extend([] if y is None else [x.shape[:-1].numel()])
        return y

    monkeypatch.setattr(int8, "few_rows", counted)
    return found


def rows_of(stream: Iterator[NewToken]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for new in stream:
        rows[new.row].append(new.token)
    return rows


def greedy_without_cache(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("adapter", [None, "one"])
def test_cached_decoding_equals_whole_forward_passes(model: Any, adapter: str | None, used: list[int]) -> None:
    with core.disable(model) if adapter is None else core.use(model, adapter):
        found = [list(generate(model, prompt, max_new_tokens=TOKENS)) for prompt in PROMPTS]
        if adapter is None and KERNELS is not None and KERNELS.few_rows:  # fused forwards with adapters do not use it
            assert 1 in used
        assert found == [greedy_without_cache(model, prompt) for prompt in PROMPTS]
    assert len({tuple(each) for each in found}) == len(PROMPTS)


def test_logits_of_a_cached_step_equal_those_of_a_whole_forward_pass(model: Any) -> None:
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad(), core.use(model, "one"):
        whole = model(ids, use_cache=False).logits[:, -1]
        read = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=read.past_key_values, use_cache=True).logits[:, -1]
    assert (step - whole).norm() <= 1e-3 * whole.norm()


def test_each_row_has_its_own_adapter(model: Any) -> None:
    names = ["one", None, "two", "one"]
    mixed = rows_of(generate_batch(model, PROMPTS, max_new_tokens=TOKENS, adapters=names))
    for prompt, name, row in zip(PROMPTS, names, mixed, strict=True):
        (alone,) = [
            [new.token for new in generate_batch(model, [prompt], max_new_tokens=TOKENS, adapters=[name])],
        ]
        assert row == alone
    base = rows_of(generate_batch(model, PROMPTS, max_new_tokens=TOKENS, adapters=[None] * 4))
    assert base[1] == mixed[1] and all(base[row] != mixed[row] for row in (0, 2, 3))
