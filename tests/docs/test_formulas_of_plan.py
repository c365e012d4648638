"""One test per formula of docs/math.md, (20) to (43): estimates of the plan, compared with tensors and counters of torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantized_layers import quantized_linear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorakit import core, hub
from lorakit.config import LoraConfig
from lorakit.core.quantization import weight_format_of
from lorakit.plan import Job, ModelShape, Plan, Speed, accelerated, activations, count, estimate, flops, memory
from lorakit.plan import flops as timing
from lorakit.plan.quantized import Quantization, storage_named
from lorakit.speed import accelerate
from lorakit.train.loop.optimizer import build_adamw, state_tensors

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
JOB = Job(batch_rows=2, length_tokens=16)


def shape_of(model: nn.Module) -> ModelShape:
    return hub.shape_of_module(model, "tiny", "a test")


def planned(model: nn.Module, **fields: Any) -> Plan:
    return estimate(shape_of(model), CONFIG, Job(**{"batch_rows": 2, "length_tokens": 16, **fields}))


def loss_of(model: Any) -> torch.Tensor:
    tokens = torch.arange(32).reshape(2, 16)
    loss: torch.Tensor = model(tokens, labels=tokens, use_cache=False).loss
    return loss


def size_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_take_their_dtype_times_their_number(tiny_llama: Any) -> None:
    needs = planned(tiny_llama).lora.memory
    assert needs.bytes_of("weights") == size_bytes(tiny_llama.to(torch.bfloat16).parameters())


def test_adapter_gradient_and_moments_take_four_bytes_a_number_each(tiny_llama: Any) -> None:
    needs = planned(tiny_llama).lora.memory
    tiny_llama.to(torch.bfloat16).train()
    core.attach(tiny_llama, CONFIG)
    trained = core.trainable_parameters(tiny_llama)
    assert needs.bytes_of("adapter") == size_bytes(p for _, p in trained)
    loss_of(tiny_llama).backward()
    assert needs.bytes_of("gradients") == size_bytes(p.grad for _, p in trained)
    assert not any(p.grad is not None for n, p in tiny_llama.named_parameters() if "lora_" not in n)
    optimizer = build_adamw(trained, 1e-3, 0.0)
    optimizer.step()
    moments = {k: t for k, t in state_tensors(optimizer, trained).items() if k.startswith("exp_avg")}
    assert needs.bytes_of("optimizer") == size_bytes(moments.values())


def test_full_fine_tuning_takes_sixteen_bytes_a_number(tiny_llama: Any) -> None:
    needs, numbers = planned(tiny_llama, dtype="float32").full.memory, sum(p.numel() for p in tiny_llama.parameters())
    assert [needs.bytes_of(cause) for cause in ("weights", "gradients", "optimizer")] == [
        4 * numbers,
        4 * numbers,
        8 * numbers,
    ]


def test_activations_are_what_autograd_saves(tiny_llama: Any) -> None:
    """Bytes of distinct storages that a forward keeps, without parameters, near the formula (which leaves out trifles)."""
    shape = shape_of(tiny_llama)
    reckoned = activations.of_lora(shape, count(shape, CONFIG), 0.0, JOB)
    tiny_llama.to(torch.bfloat16).train()
    core.attach(tiny_llama, CONFIG)
    own = {p.untyped_storage().data_ptr() for p in tiny_llama.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.arange(32).reshape(2, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = tiny_llama.model(tokens, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    assert sum(kept.values()) == pytest.approx(reckoned.blocks + reckoned.outside, rel=0.15)


def kept_by_accelerated_loss(model: Any) -> list[int]:
    """Bytes of the distinct storages that an accelerated forward and its loss keep, without parameters."""
    core.attach(model.to(torch.bfloat16).train(), CONFIG)
    head = accelerate(model).head
    assert head is not None
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.arange(32).reshape(2, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head.loss_sum(model, tokens, input_ids=tokens, use_cache=False)
    return [tensor.untyped_storage().nbytes() for tensor in kept.values()]


def test_accelerated_layers_keep_what_the_formula_says(tiny_llama: Any) -> None:
    shape, tokens = shape_of(tiny_llama), 32
    job = dataclasses.replace(JOB, accelerated=True)
    reckoned = activations.of_lora(shape, count(shape, CONFIG), 0.0, job)
    heads = 2 * shape.query_width + 2 * shape.kv_width
    numbers = 2 * shape.hidden + heads + 2 * shape.intermediate + 7 * 4
    assert reckoned.blocks == shape.layers * tokens * (2 * numbers + 8)
    assert reckoned.transient == 2 * tokens * (3 * shape.hidden + max(2 * shape.intermediate, heads))
    whole = reckoned.blocks + reckoned.outside + accelerated.loss_bytes(shape, job)
    assert sum(kept_by_accelerated_loss(tiny_llama)) == pytest.approx(whole, rel=0.02)


def test_a_loss_without_logits_keeps_the_gradient_of_its_input(tiny_llama: Any) -> None:
    shape = shape_of(tiny_llama)
    needs = planned(tiny_llama, accelerated=True).lora.memory
    rows = 32  # all of them: 256 rows of 512 words are less than 48 MiB
    assert needs.bytes_of("logits") == 2 * (rows * 512 + 2 * 32 * shape.hidden) + 8 * 32
    trained = 2 * 15  # the last token of a row predicts nothing
    kept = kept_by_accelerated_loss(tiny_llama)
    assert trained * 2 * shape.hidden in kept and trained * 8 in kept
    assert max(kept) < 32 * 512 * 2  # no logits among them


def test_padding_is_no_token_of_a_step() -> None:
    job = Job(batch_rows=4, length_tokens=100, accumulation=2, accelerated=True, mean_tokens=62.5)
    assert job.step_tokens == 4 * 62.5 * 2
    assert dataclasses.replace(job, accelerated=False).step_tokens == 4 * 100 * 2
    assert job.batch_tokens == 400  # in memory the longest rows may meet


def test_logits_take_twelve_bytes_a_token_and_word(tiny_llama: Any) -> None:
    shape = shape_of(tiny_llama)
    assert memory.logits_bytes(shape, JOB) == 3 * 4 * (2 * 16) * 512


def test_peak_is_the_largest_moment(tiny_llama: Any) -> None:
    needs = planned(tiny_llama).lora.memory
    at_peak = {line.cause: line.at_peak_bytes for line in needs.lines}
    assert needs.peak_bytes == sum(at_peak.values())
    assert at_peak["runtime"] == memory.RUNTIME_BYTES
    assert all(line.at_peak_bytes <= line.size_bytes for line in needs.lines)
    again = planned(tiny_llama, recompute="layers").lora.memory
    assert again.bytes_of("activations") < needs.bytes_of("activations")


def counted_flops(model: Any, backward: bool) -> tuple[int, int]:
    """FLOPs that torch counts: of plain products, and of attention."""
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(model)
        if backward:
            loss.backward()
    by_operation = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in by_operation.items() if op in ("aten.mm", "aten.addmm", "aten.bmm"))
    return products, sum(by_operation.values()) - products


def test_products_cost_two_per_weight_and_token(tiny_gpt2: Any) -> None:
    products, _ = counted_flops(tiny_gpt2, backward=False)
    assert products == flops.matmuls(shape_of(tiny_gpt2)) * JOB.batch_tokens


def test_attention_costs_four_per_pair_and_width(tiny_gpt2: Any) -> None:
    shape, T = shape_of(tiny_gpt2), 16
    pairs = sum(position + 1 for position in range(T))  # a query meets itself and what came before
    assert flops.attention(shape, T) * T == 4 * shape.layers * shape.hidden * pairs


def test_frozen_weights_need_no_second_product(tiny_gpt2: Any) -> None:
    """Backward of LoRA: dX through the base, both gradients of the factors; of full fine-tuning: dX and dW."""
    shape = shape_of(tiny_gpt2)
    tokens, base = JOB.batch_tokens, flops.matmuls(shape)
    full, _ = counted_flops(tiny_gpt2, backward=True)
    reckoned = flops.full(shape, JOB)
    within = flops.attention(shape, 16)
    assert full == pytest.approx(tokens * (reckoned.total - 3 * within), rel=0.02)

    core.attach(tiny_gpt2, CONFIG)
    lora, _ = counted_flops(tiny_gpt2, backward=True)
    costs = flops.lora(shape, count(shape, CONFIG), JOB)
    assert lora == pytest.approx(tokens * (costs.total - 3 * within), rel=0.04)
    assert lora < full
    added = sum(2 * s.rank * (s.in_features + s.out_features) for s in count(shape, CONFIG).sites)
    assert costs.total == base + within + added + base + 2 * within + 2 * added


def test_speed_is_the_rate_over_the_cost() -> None:
    speed = Speed(flops_per_second=400e9, utilisation=0.4)
    assert speed.tokens_at(0.5e9) == 400e9 * 0.4 / 0.5e9 == 320


def test_an_accelerated_token_takes_two_terms(tiny_llama: Any) -> None:
    shape = shape_of(tiny_llama)
    d, f, qk, T = shape.hidden, shape.intermediate, shape.query_width + shape.kv_width, 16
    forward = 10 * d + 3 * f + 2 * qk + 2 * shape.heads * (T + 1) / 2
    backward = 14 * d + 8 * f + 2 * qk + 5 * shape.heads * (T + 1) / 2
    job = Job(2, T, accelerated=True)
    numbers = shape.layers * (forward + backward) + 6 * shape.vocab
    assert timing.elements(shape, job) == numbers
    again = dataclasses.replace(job, recompute="layers")
    assert timing.elements(shape, again) == numbers + shape.layers * forward

    costs, speed = flops.Flops(3e8, 5e8, 0.0), Speed(flops_per_second=4e11, threads=2)
    wanted = 8e8 / (4e11 * timing.MATMUL_UTILIZATION) + numbers * timing.SECONDS_PER_ELEMENT / 2
    assert timing.token_seconds(shape, costs, job, speed) == pytest.approx(wanted, rel=1e-12)


def test_sizes_on_disk(tiny_gpt2: Any, tmp_path: Path) -> None:
    shape = shape_of(tiny_gpt2)
    plan = estimate(shape, CONFIG, JOB)
    core.attach(tiny_gpt2, CONFIG)
    core.save_adapter(tiny_gpt2, tmp_path)
    trained, base = plan.counted.trainable, shape.parameters
    adapter, with_moments, model, full = [file.size_bytes for file in plan.files]
    assert (adapter, with_moments, model, full) == (4 * trained, 12 * trained, 4 * base, 12 * base)
    header = (tmp_path / "adapter_model.safetensors").stat().st_size - adapter
    assert 0 < header < 200 * len(core.trainable_parameters(tiny_gpt2))


def tensors_of(module: nn.Module) -> tuple[torch.Tensor, ...]:
    row = weight_format_of(module)
    return row.tensors(row.stored(module, "weight"))


@pytest.mark.parametrize(
    ("name", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False), ("int8-torchao", False)]
)
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (96, 200)])
def test_a_quantized_weight_takes_its_bits_and_scales(name: str, double: bool, rows: int, columns: int) -> None:
    storage = storage_named(name)
    pytest.importorskip(storage.package)
    made = quantized_linear(nn.Linear(columns, rows, bias=False), Quantization(name, double))
    assert storage.size(rows, columns, 4, double) == size_bytes(tensors_of(made))


def test_an_hqq_weight_takes_its_bits_scales_and_zero_points() -> None:
    pytest.importorskip("hqq")
    for bits in (4, 8):
        made = quantized_linear(nn.Linear(64, 96, bias=False).bfloat16(), Quantization(f"hqq{bits}"))
        assert storage_named(f"hqq{bits}").size(96, 64, 2, False) == size_bytes(tensors_of(made))
