"""Quantizing the linear layers of a model for int8 matmuls."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.int8.calibrating import TRAINED, base_losses
from lorakit.core.int8.quantized_base import NOT_REACHED, Int8Base, quantize_base
from lorakit.core.quantization.int8_linear import Int8Linear
from lorakit.errors import ConfigError, DataError, MergeError, NonFiniteError
from lorakit.ops.int8_weight import input_scales

from ...small_models import WIDER
from ...train.processes.processes import begin, end
from . import int8_process

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(**fields: Any) -> Any:
    """Return a small frozen model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**WIDER, **fields})).requires_grad_(False).eval()


def batches(count: int = 2, length: int = 12, seed: int = 1) -> list[dict[str, Tensor]]:
    """Return batches of two rows with labels; the second row is shorter."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 96, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length - 3 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0]["input_ids"]).logits


def test_the_linear_layers_of_the_blocks_are_replaced_and_the_head_is_not() -> None:
    model = llama()
    before = logits(model)
    report = quantize_base(model, batches())
    assert set(report.paths) == {
        f"model.layers.{i}.{'self_attn' if leaf[0] in 'qkvo' else 'mlp'}.{leaf}" for i in range(2) for leaf in LEAVES
    }
    assert all(isinstance(model.get_submodule(path), Int8Linear) for path in report.paths)
    assert type(model.lm_head) is nn.Linear and dict(report.skipped) == {"lm_head": "output head"}
    assert report.tokens == 2 * (12 + 9)
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()
    assert report.bytes_after < 0.75 * report.bytes_before  # embeddings and head are large here
    assert list(report.worst.values()) == sorted(report.worst.values(), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_size_is_that_of_the_page(dtype: torch.dtype) -> None:
    """docs/quantized.md: out·in + 4·out + 16·out·(bytes of the dtype), and 4·in + 8·16 for each group."""
    model = llama().to(dtype)
    report = quantize_base(model, batches())
    modules: Any = [model.get_submodule(path) for path in report.paths]
    before = sum(m.out_features * m.in_features * dtype.itemsize for m in modules)
    after = sum(m.out_features * (m.in_features + 4 + 16 * dtype.itemsize) for m in modules)
    groups = {id(m.gain): 4 * m.in_features + 128 for m in modules}
    assert report.bytes_before - report.bytes_after == before - after - sum(groups.values())


def test_layers_with_one_input_share_its_scales() -> None:
    model = llama()
    quantize_base(model, batches())
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_proj.gain is attention.k_proj.gain is attention.v_proj.gain
        assert attention.q_proj.kept is attention.v_proj.kept
        assert mlp.gate_proj.gain is mlp.up_proj.gain
    gains = {id(module.gain) for module in model.modules() if isinstance(module, Int8Linear)}
    assert len(gains) == 2 * 4


def test_the_scales_are_those_of_the_largest_inputs_of_the_original_model_without_padding() -> None:
    model, plain, found = llama(), llama(), batches()
    seen = torch.zeros(64)
    for batch in found:
        states: list[Tensor] = []
        handle = plain.model.layers[1].mlp.gate_proj.register_forward_pre_hook(
            lambda _, args, states=states: states.append(args[0])
        )
        with torch.no_grad():
            plain(**batch)
        handle.remove()
        seen = torch.maximum(seen, states[0][batch["attention_mask"].bool()].abs().amax(0))
    quantize_base(model, found, kept=4, smoothing=0.7)
    mlp = plain.model.layers[1].mlp
    gain, kept = input_scales(seen, [mlp.gate_proj.weight, mlp.up_proj.weight], 4, 0.7)
    made = model.model.layers[1].mlp.gate_proj
    assert torch.equal(made.gain, gain) and torch.equal(made.kept, kept)


def test_the_losses_are_those_of_the_original_model() -> None:
    model, plain = llama(), llama()
    report = quantize_base(model, batches())
    assert report.losses == base_losses(plain, batches())
    assert report.losses == tuple(float(plain(**batch).loss) for batch in batches())
    again = base_losses(model, batches())
    assert again != report.losses
    assert max(abs(a - b) for a, b in zip(again, report.losses, strict=True)) < 0.01
    assert quantize_base(llama(), [{"input_ids": batches()[0]["input_ids"]}]).losses == ()


def test_the_same_batches_give_the_same_bits() -> None:
    first, second = llama(), llama()
    quantize_base(first, batches())
    quantize_base(second, batches())
    assert bits(first) == bits(second)


@pytest.mark.parametrize("keep", [True, False])
def test_originals_are_freed_unless_they_are_kept(keep: bool) -> None:
    model = llama()
    weights = [weakref.ref(model.model.layers[0].mlp.up_proj.weight)]
    before = logits(model)
    report = quantize_base(model, batches(), keep=keep)
    gc.collect()
    assert (weights[0]() is not None) == keep
    if keep:
        report.restore()
        assert torch.equal(logits(model), before)
        assert not any(isinstance(module, Int8Linear) for module in model.modules())
        return
    with pytest.raises(MergeError, match="not kept") as raised:
        report.restore()
    assert raised.value.field == "keep"


def broken_second_batch() -> list[Mapping[str, Tensor]]:
    return [batches()[0], {"input_ids": torch.full((1, 3), 10_000)}]


@pytest.mark.parametrize("case", ["batch", "empty", "weight", "input"])
def test_a_failed_call_changes_nothing(case: str) -> None:
    model = llama().train()
    given: list[Any] = batches()
    wanted: type[Exception] = NonFiniteError
    if case == "batch":
        given, wanted = broken_second_batch(), IndexError
    elif case == "empty":
        given, wanted = [], DataError
    elif case == "weight":
        model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    else:
        model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.inf
    before = bits(model)
    with pytest.raises(wanted):
        quantize_base(model, given)
    assert bits(model) == before and all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def attached(model: nn.Module, *names: str, **fields: Any) -> nn.Module:
    """Attach adapters with random B to a model."""
    for seed, name in enumerate(names):
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **fields)
        core.attach(model, config, name, seed=seed)
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_adapters_may_be_attached_before_or_after(dora: bool) -> None:
    first = attached(llama(), "a", "b", use_dora=dora)
    before = logits(first)
    report = quantize_base(first, batches(), keep=True)
    second = llama()
    quantize_base(second, batches())
    attached(second, "a", "b", use_dora=dora)
    if not dora:  # the magnitude of DoRA is that of the weight at the time
        for route in (["a", "b"], [None, "a"]):
            with core.route(first, route):
                one = logits(first)
            with core.route(second, route):
                assert torch.equal(one, logits(second))
    with core.disable(first), core.disable(second):
        assert torch.equal(logits(first), logits(second))
    report.restore()
    assert torch.equal(logits(first), before)


def test_layers_that_are_not_converted_are_reported_with_the_reason() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    model.model.layers[1].mlp.unused = nn.Linear(8, 8).requires_grad_(False)
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    model.model.projector = nn.Linear(64, 64).requires_grad_(False)
    report = quantize_base(model, batches())
    assert dict(report.skipped) == {
        "lm_head": "output head",
        "model.layers.0.mlp.up_proj": TRAINED,
        "model.layers.0.mlp.down_proj": "tied weight",
        "model.layers.1.mlp.down_proj": "tied weight",
        "model.layers.1.mlp.unused": NOT_REACHED,
        "model.layers.1.self_attn.o_proj": "it has hooks",
        "model.projector": "outside the model's blocks",
    }


def test_a_trained_base_a_quantized_base_and_merged_adapters_are_rejected() -> None:
    with pytest.raises(ConfigError, match="requires_grad_") as raised:
        quantize_base(llama().requires_grad_(True), batches())
    assert raised.value.what == TRAINED
    model = llama()
    quantize_base(model, batches())
    with pytest.raises(ConfigError, match="quantized") as raised:
        quantize_base(model, batches())
    assert raised.value.field == "base_matmul"
    merged = attached(llama(), "a")
    core.merge(merged, "a")
    with pytest.raises(MergeError, match="a"):
        quantize_base(merged, batches())
    for field, value in (("kept", -1), ("smoothing", 1.5)):
        with pytest.raises(ConfigError) as raised:
            quantize_base(llama(), batches(), **{field: value})
        assert raised.value.field == field


def test_a_report_can_be_printed() -> None:
    report = quantize_base(llama(), batches())
    assert isinstance(report, Int8Base) and "originals" not in repr(report)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux lists the mapped files")
def test_the_file_of_the_original_weights_is_unmapped(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    def is_mapped() -> bool:
        gc.collect()
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    was_mapped, before = is_mapped(), logits(model)
    report = quantize_base(model, batches())
    assert not is_mapped()
    assert was_mapped or report.bytes_after < report.bytes_before  # not every release of transformers maps the file
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (logits(model) - before).norm() < 0.05 * before.norm()


@pytest.mark.costly(cases=0)
def test_processes_with_different_batches_get_the_same_weights(tmp_path: Path) -> None:
    for code, _, messages in end(begin([int8_process.__file__, str(tmp_path)], 2)):
        assert code == 0, messages
    (first, tokens), (second, other_tokens) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert tokens == other_tokens == 6 + 8
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    alone = int8_process.model()
    quantize_base(alone, [int8_process.batch(0), int8_process.batch(1)], forward=int8_process.run)
    assert all(torch.equal(first[name], tensor) for name, tensor in alone.state_dict().items())


def step_gradients(model: Any) -> list[Tensor]:
    """Return the gradients of all adapters, summed over two mixed batches with dropout."""
    model.train().zero_grad()
    with core.route(model, ["a", "b"]):
        for batch in batches():
            torch.manual_seed(0)
            model(**batch, use_cache=False).loss.backward()
    return [p.grad.clone() for _, p in core.trainable_parameters(model)]


def test_gradients_reach_every_adapter_with_dropout_accumulation_and_recomputation() -> None:
    model: Any = attached(llama(), "a", "b", lora_dropout=0.2)
    core.set_trained(model, {"a": True, "b": True})
    quantize_base(model, batches())
    plain = step_gradients(model)
    assert len(plain) == 2 * 2 * 14
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in plain)
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for one, other in zip(plain, step_gradients(model), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_file_does_not_depend_on_the_format_of_the_base(tmp_path: Path) -> None:
    model = llama()
    attached(model, "a")
    core.save_adapter(model, tmp_path / "plain", "a")
    report = quantize_base(model, batches(), keep=True)
    core.save_adapter(model, tmp_path / "int8", "a")
    names = "adapter_model.safetensors", "adapter_config.json"
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes()
    assert core.load_adapter(llama(), tmp_path / "int8", "x").base == "same at other precision"
    assert core.load_adapter(model, tmp_path / "plain", "y").base == "same at other precision"
    sidecar = json.loads((tmp_path / "int8" / "lorakit.json").read_text())
    assert sidecar["base"]["dtype"] == "int8 matmul (W8A8)"
    other = llama()
    quantize_base(other, batches())
    assert core.load_adapter(other, tmp_path / "int8", "x").base == "same"
    report.restore()
    assert core.load_adapter(model, tmp_path / "plain", "z").base == "same"


def test_a_merge_writes_int8_and_an_unmerge_restores_the_bits() -> None:
    model = attached(llama(), "a")
    quantize_base(model, batches())
    before, adapted = bits(model), logits(model)
    report = core.merge(model, "a")
    assert 0 < report.error < 0.02
    assert (logits(model) - adapted).norm() < 0.05 * adapted.norm()
    core.unmerge(model)
    assert bits(model) == before
    core.merge_and_unload(model, "a", dense=True)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert (logits(model) - adapted).norm() < 0.05 * adapted.norm()


def test_conv1d_layers_are_converted() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).requires_grad_(False).eval()
    before = logits(model)
    report = quantize_base(model, batches())
    assert len(report.paths) == 2 * 4
    assert (logits(model) - before).norm() < 0.05 * before.norm()
    attached(model, "a")
    assert len(core.sites(model)) == 8


def test_routers_and_experts_keep_their_dtype() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes = {**WIDER, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts_per_tok=2)).requires_grad_(False).eval()
    report = quantize_base(model, batches())
    kept = {path.rpartition("layers.")[2] for path in report.skipped if path != "lm_head"}
    assert kept.isdisjoint(path.rpartition("layers.")[2] for path in report.paths)
    assert all(".experts." not in path and not path.endswith(".mlp.gate") for path in report.paths)
    assert any(path.endswith("shared_expert.up_proj") for path in report.paths)
