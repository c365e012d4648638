"""Fused decoder layers in generation: outputs as the model's own, rows as alone, and the own forward when in doubt."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorakit import LoraConfig, core
from lorakit.generate import Continuation, Engine, NewToken, PromptRead, rows_are_independent
from lorakit.ops import cache
from lorakit.ops.kernels import compiled
from lorakit.speed import accelerate, fuse_decoding, multiply_few_rows, undo_fused_decoding
from lorakit.speed.decoding import BoundDecoding

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, tuple[type[nn.Module], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 16, "sliding_window": 16}),
}
PROMPTS = [[(7 * i + k) % 299 for i in range(length)] for k, length in enumerate((3, 20, 150))]


def model_of(name: str = "llama", dtype: torch.dtype = torch.float32, *names: str) -> Any:
    kind, config, fields = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(**SIZES, **fields)).to(dtype).eval()
    for adapter in names:
        core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), adapter)
    return model


def logprobs_of(
    model: Any, adapters: tuple[str | None, ...] = (None,), new: int = 6, rows: int = len(PROMPTS)
) -> list[list[float]]:
    """Return the log-probabilities of forced tokens: of all tokens of prompts, then of new ones."""
    engine = Engine(model)
    for i in range(rows):
        prompt = PROMPTS[i % len(PROMPTS)]
        engine.submit(
            Continuation(tuple(prompt), new, adapter=adapters[i % len(adapters)], logprobs=0, prompt_logprobs=0)
        )
    found: dict[int, list[float]] = {i: [] for i in range(rows)}
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, PromptRead):
                found[event.row] += [one.logprob for one in event.logprobs]
            elif isinstance(event, NewToken) and event.logprobs is not None:
                found[event.row].append(event.logprobs.logprob)
    return [*found.values()]


def difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    pairs = [pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one, other, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record, for each call of a fused forward, whether it ran."""
    ran = list[bool]()
    run = BoundDecoding.run

    def noted(self: BoundDecoding, *args: Any) -> Any:
        y = run(self, *args)
        ran.append(y is not None)
        return y

    monkeypatch.setattr(BoundDecoding, "run", noted)
    return ran


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_the_model(name: str, runs: list[bool]) -> None:
    model = model_of(name)
    expected = logprobs_of(model)
    assert fuse_decoding(model) == 2 and fuse_decoding(model) == 0
    runs.clear()
    ours = logprobs_of(model)
    assert runs and all(runs)
    assert 0 < difference(ours, expected) < 1e-3
    undo_fused_decoding(model)
    assert type(model) is MODELS[name][0] and logprobs_of(model) == expected


def test_adapters_of_rows_act_whether_they_were_attached_before_or_after(runs: list[bool]) -> None:
    model = model_of("llama", torch.float32, "one")
    assert fuse_decoding(model) == 2
    core.attach(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "two")
    model.eval()
    runs.clear()
    ours = logprobs_of(model, ("one", None, "two"))
    assert all(runs)
    undo_fused_decoding(model)
    expected, base = logprobs_of(model, ("one", None, "two")), logprobs_of(model)
    assert difference(ours, expected) < 1e-3 and difference(ours[1:2], base[1:2]) < 1e-3
    assert difference(ours[::2], base[::2]) > 0.1


@pytest.fixture
def wholes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record, for each call of a fused forward, whether one kernel computed the layer."""
    ran = list[bool]()
    whole = BoundDecoding._whole

    def noted(self: BoundDecoding, *args: Any) -> Any:
        y = whole(self, *args)
        ran.append(y is not None)
        return y

    monkeypatch.setattr(BoundDecoding, "_whole", noted)
    return ran


NAMES = ("one", None, "two")
needs_kernels = pytest.mark.skipif(compiled.kernels() is None, reason="no kernels")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_one_kernel_for_a_layer_has_the_bits_of_separate_ones(
    name: str, dtype: torch.dtype, wholes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, dtype, "one")
    core.attach(model, LoraConfig(r=9, target_modules=["q_proj", "down_proj"], init_lora_weights=False), "two")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.rand_like(parameter)
    multiply_few_rows(model.eval())
    assert fuse_decoding(model) == 2
    wholes.clear()
    whole = logprobs_of(model, NAMES)
    if not few_rows_in(dtype):
        assert not any(wholes)
        return
    assert sum(wholes) > len(wholes) / 2
    monkeypatch.setattr(BoundDecoding, "_whole", lambda *_: None)
    assert logprobs_of(model, NAMES) == whole


def few_rows_in(dtype: torch.dtype) -> int:
    kernels = compiled.kernels()
    return 0 if kernels is None else kernels.linear_rows[dtype]


def change_base(model: Any) -> None:
    weight = model.model.layers[1].mlp.down_proj.base_layer.weight
    weight.data = weight.data * 3


def change_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.mul_(3)


def change_factor(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.lora_B["one"].weight.mul_(9)


def hook_on_base(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.base_layer.register_forward_hook(lambda *given: 3 * given[-1])


def hook_on_factor(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.lora_B["one"].register_forward_hook(lambda *given: 9 * given[-1])


def other_forward(model: Any) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    forward = norm.forward
    norm.forward = lambda x: 3 * forward(x)


@needs_kernels
@pytest.mark.parametrize(
    "change", [change_base, change_norm, change_factor, hook_on_base, hook_on_factor, other_forward]
)
def test_a_change_counts_from_the_next_step(change: Callable[[Any], None], wholes: list[bool]) -> None:
    def after(model: Any, *, is_changed: bool = True) -> list[float]:
        engine = Engine(model)
        engine.submit(Continuation(tuple(PROMPTS[1]), 8, adapter="one", logprobs=5))
        for _ in range(3):
            engine.step()
        with torch.no_grad():
            change(model) if is_changed else None
        (event,) = engine.step()
        assert isinstance(event, NewToken) and event.logprobs is not None
        return [value for _, value in sorted(event.logprobs.top)]

    model = model_of("llama", torch.float32, "one")
    multiply_few_rows(model)
    own, unchanged = copy.deepcopy(model), copy.deepcopy(model)
    fuse_decoding(model)
    fuse_decoding(unchanged)
    ours = after(model)
    assert few_rows_in(torch.float32) == 0 or wholes[-5:-3] == [True, True]
    assert ours == pytest.approx(after(own), abs=1e-4)
    assert after(unchanged, is_changed=False) != pytest.approx(ours, abs=1e-2)


@needs_kernels
def test_adapters_of_many_ranks_in_one_batch_are_multiplied_one_by_one(wholes: list[bool]) -> None:
    ranks = {f"r{r}": r for r in (1, 2, 4, 8, 16)}
    model = model_of()
    for name, r in ranks.items():
        core.attach(model, LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False), name)
    multiply_few_rows(model.eval())
    expected = logprobs_of(model, tuple(ranks), rows=5)
    fuse_decoding(model)
    assert difference(logprobs_of(model, tuple(ranks), rows=5), expected) < 1e-3


@needs_kernels
def test_nan_of_an_adapter_stays_in_its_row() -> None:
    model = model_of("llama", torch.bfloat16, "one", "two")
    multiply_few_rows(model)
    fuse_decoding(model)
    expected = logprobs_of(model, ("one", None, "two"))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.lora_B["two"].weight[0, 0] = torch.nan
    ours = logprobs_of(model, ("one", None, "two"))
    assert ours[:2] == expected[:2] and all(math.isnan(each) for each in ours[2])


@needs_kernels
def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    model = model_of("llama", torch.bfloat16, "one", "two")
    multiply_few_rows(model)
    assert fuse_decoding(model) == 2
    assert rows_are_independent(model, ("one", "two"))


def test_hooks_of_all_modules_run(runs: list[bool]) -> None:
    model = model_of("llama", torch.float32, "one")
    fuse_decoding(model)
    for path, module in model.named_modules():
        if ".layers.0." not in path or not path.endswith(("proj", "norm", "mlp", "self_attn", "act_fn")):
            continue
        noted = Mock(return_value=None)
        handle = module.register_forward_hook(noted)
        logprobs_of(model, ("one",), new=2)
        handle.remove()
        assert noted.called, path
    runs.clear()
    logprobs_of(model, new=2)
    assert all(runs)


def test_a_changed_forward_or_setting_makes_the_own_forward_run(runs: list[bool]) -> None:
    model = model_of()
    fuse_decoding(model)
    attention = model.model.layers[0].self_attn
    attention.scaling *= 2
    expected = logprobs_of(copy.deepcopy(model))
    runs.clear()
    assert logprobs_of(model) == expected and not runs


def test_calls_with_gradients_or_other_caches_run_the_own_forward(runs: list[bool]) -> None:
    model = model_of()
    fuse_decoding(model)
    runs.clear()
    ids = torch.tensor([PROMPTS[0]])
    model(input_ids=ids).logits.sum().backward()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True)
    assert not runs


def test_copies_are_of_the_original_class_and_the_model_can_be_accelerated() -> None:
    model = model_of("llama", torch.float32, "one")
    fuse_decoding(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.model.layers[0]) is type(LlamaForCausalLM(LlamaConfig(**SIZES)).model.layers[0])
    expected = logprobs_of(model, ("one",))
    accelerated = accelerate(model)
    assert "decoder layer" in str(accelerated)
    assert difference(logprobs_of(model, ("one",)), expected) < 1e-3
    accelerated.undo()
    assert logprobs_of(model, ("one",)) == expected


def test_unknown_layers_and_wrong_fused_forwards_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuse_decoding(GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=300))) == 0
    assert fuse_decoding(nn.Linear(2, 2)) == 0
    attend = cache.attend_cached
    monkeypatch.setattr("lorakit.speed.decoding.attend_cached", lambda *a, **k: 1.1 * attend(*a, **k))
    assert fuse_decoding(model_of()) == 0
