"""The derived bytes of accelerated forwards compared with what autograd saves, counted with saved-tensor hooks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.plan import Job, ModelShape, Speed, accelerated, activations, catalogue, count, estimate, memory

from .test_activations import LAYERS, LENGTH, ROWS, _model
from .test_activations import _saved_bytes as _saved_in_graph


def _saved_bytes(model: Any, fast: Any, ids: Any) -> int:
    """Return the bytes of distinct storages in the graph of the loss, without parameters and buffers."""
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast.head.loss_sum(model, ids, input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _both(name: str, targets: Any, job: Job, base_dropout: float = 0.0, **words: Any) -> tuple[int, Any, ModelShape]:
    """Return the bytes that an accelerated model saved, the estimate, and its shape."""
    import torch

    from lorakit import core, hub
    from lorakit.core.optimizers import freeze_factors
    from lorakit.speed import accelerate

    torch.manual_seed(0)
    model = _model(name, base_dropout).to(getattr(torch, job.dtype))
    shape = hub.shape_of_module(model, "small", "here")
    config = LoraConfig(r=4, target_modules=targets, **words)
    core.attach(model, config)
    if job.optimizer == "lorafa":
        freeze_factors(model)
    model.train()
    if job.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)})
    fast = accelerate(model, keep_feed_forward=job.recompute != "feed-forward")
    saved = _saved_bytes(model, fast, torch.randint(0, 300, (ROWS, LENGTH)))
    counted = count(shape, config, optimizer=job.optimizer)
    return saved, activations.of_lora(shape, counted, config.lora_dropout, job), shape


CASES = [
    ("llama", "all-linear"),
    ("llama", ["q_proj", "v_proj"]),
    ("qwen2", "all-linear"),
    ("qwen3", "all-linear"),
    ("gpt2", ["c_attn", "c_proj"]),
    ("gpt2", "all-linear"),
    ("gemma3", "all-linear"),
]


@pytest.mark.costly(cases=4)
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "targets"), CASES, ids=str)
def test_what_autograd_saves(name: str, targets: Any, dtype: str, lora_dropout: float) -> None:
    job = Job(ROWS, LENGTH, dtype=dtype, accelerated=True)
    saved, planned, shape = _both(name, targets, job, lora_dropout=lora_dropout)
    assert planned.fused == planned.of_blocks == 2 * LAYERS
    reckoned = planned.blocks + planned.outside + accelerated.loss_bytes(shape, job)
    assert reckoned == pytest.approx(saved, rel=0.005)


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "targets"), [CASES[0], CASES[4]], ids=str)
def test_checkpointing_keeps_the_inputs_of_the_layers(name: str, targets: Any, dtype: str, lora_dropout: float) -> None:
    job = Job(ROWS, LENGTH, dtype=dtype, accelerated=True, recompute="layers")
    saved, planned, shape = _both(name, targets, job, lora_dropout=lora_dropout)
    reckoned = LAYERS * planned.boundary + planned.outside + accelerated.loss_bytes(shape, job)
    assert reckoned == pytest.approx(saved, rel=0.005)
    assert planned.largest_block * LAYERS == planned.blocks


@pytest.mark.costly(cases=4)
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "targets"), CASES, ids=str)
def test_what_gate_and_up_gave_is_not_kept(name: str, targets: Any, dtype: str, lora_dropout: float) -> None:
    job = Job(ROWS, LENGTH, dtype=dtype, accelerated=True, recompute="feed-forward")
    saved, planned, shape = _both(name, targets, job, lora_dropout=lora_dropout)
    reckoned = planned.blocks + planned.outside + accelerated.loss_bytes(shape, job)
    assert reckoned == pytest.approx(saved, rel=0.005)
    kept = dataclasses.replace(job, recompute="none")
    more = activations.of_lora(shape, count(shape, LoraConfig(r=4, target_modules=targets)), lora_dropout, kept)
    each = job.dtype_bytes * job.batch_tokens * shape.intermediate * (2 if shape.gated else 1)
    assert more.blocks - planned.blocks == LAYERS * each
    assert planned.transient - more.transient == each  # one layer at a time recomputes them


@pytest.mark.costly(cases=4)
@pytest.mark.parametrize(
    ("name", "targets", "words", "fused"),
    [
        ("llama", "all-linear", {"use_dora": True}, 0),
        ("llama", "all-linear", {"lora_bias": True}, 0),
        ("llama", "all-linear", {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, 0),
        ("llama", ["q_proj", "v_proj"], {"use_dora": True}, LAYERS),  # only the feed-forward
        ("llama", ["q_proj", "v_proj"], {"use_dora": True, "recompute": "feed-forward"}, LAYERS),
        ("llama", ["gate_proj", "o_proj"], {"use_dora": True}, 0),
        ("gpt2", "all-linear", {"base_dropout": 0.1, "lora_dropout": 0.1}, 2 * LAYERS),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_plain_runs_as_it_is(name: str, targets: Any, words: Any, fused: int, dtype: str) -> None:
    job = Job(ROWS, LENGTH, dtype=dtype, accelerated=True, recompute=words.get("recompute", "none"))
    words = {name: value for name, value in words.items() if name != "recompute"}
    saved, planned, shape = _both(name, targets, job, **words)
    assert (planned.fused, planned.of_blocks) == (fused, 2 * LAYERS)
    reckoned = planned.blocks + planned.outside + accelerated.loss_bytes(shape, job)
    assert reckoned == pytest.approx(saved, rel=0.03)


def test_upcast_matmuls_keep_their_low_rank_activations_in_fp32() -> None:
    import torch

    from lorakit import core, hub
    from lorakit.ops import choices
    from lorakit.speed import accelerate

    model = _model("llama", 0.0).to(torch.bfloat16)
    shape = hub.shape_of_module(model, "small", "here")
    config = LoraConfig(r=4, target_modules="all-linear")
    weights = [model.get_parameter(f"{site.path}.weight") for site in shape.sites if site.dense]
    core.attach(model, config)
    model.train()
    fast = accelerate(model)
    job = Job(4, LENGTH, accelerated=True, upcasts=True)
    with choices.activate({choices.fp32_name(right): 1 for W in weights for right in (W, W.t())}):
        saved = _saved_bytes(model, fast, torch.randint(0, 300, (4, LENGTH)))
    counted = count(shape, config)
    planned, narrow = (
        activations.of_lora(shape, counted, 0.0, j) for j in (job, dataclasses.replace(job, upcasts=False))
    )
    assert planned.blocks + planned.outside + accelerated.loss_bytes(shape, job) == pytest.approx(saved, rel=0.005)
    assert planned.blocks - narrow.blocks == 2 * job.batch_tokens * sum(site.rank for site in counted.sites)
    assert planned.transient - narrow.transient == 4 * job.batch_tokens * 2 * (shape.intermediate + shape.hidden)


@pytest.mark.costly(cases=2)
@pytest.mark.parametrize("recompute", ["none", "feed-forward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2", "Bert"])
def test_a_classifier_keeps_what_the_blocks_of_its_language_model_keep(
    family: str, head: str, dtype: str, recompute: str
) -> None:
    import torch
    import transformers

    from lorakit import core, hub
    from lorakit.speed import accelerate

    config = _model(family.lower(), 0.0).config
    config.pad_token_id, config.num_labels = 0, 3
    model = getattr(transformers, f"{family}{head}")(config).to(getattr(torch, dtype))
    shape = hub.shape_of_module(model, "small", "here")
    adapter = LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["score" if hasattr(model, "score") else "classifier"]
    )
    core.attach(model, adapter)
    model.train()
    accelerate(model, keep_feed_forward=recompute != "feed-forward")
    model.config.use_cache = False
    saved = _saved_in_graph(model, torch.randint(1, 300, (ROWS, LENGTH)))
    job = Job(ROWS, LENGTH, dtype=dtype, accelerated=True, recompute=recompute)
    plan = estimate(shape, adapter, job)
    planned = activations.of_lora(shape, plan.counted, 0.0, job)
    assert planned.fused == planned.of_blocks == 2 * LAYERS and not activations.packs(shape)
    assert plan.lora.memory.bytes_of("logits") == 0
    assert planned.blocks + planned.outside == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_frozen_factor_keeps_no_output_of_attention(name: str) -> None:
    job = Job(ROWS, LENGTH, dtype="float32", accelerated=True, optimizer="lorafa")
    saved, planned, shape = _both(name, "all-linear", job)
    assert planned.blocks + planned.outside + accelerated.loss_bytes(shape, job) == pytest.approx(saved, rel=0.01)


def test_the_operations_cut_where_the_plan_says() -> None:
    import torch

    from lorakit.ops import attention, cross_entropy

    assert accelerated.FLASH_FROM == attention.FLASH_FROM
    shape = _shape("SmolLM2-135M")
    for vocab in (100, 49_152, 262_144, 2_000_000):
        wide = dataclasses.replace(shape, vocab=vocab)
        for dtype in ("bfloat16", "float32"):
            W = torch.empty(vocab, 1, dtype=getattr(torch, dtype), device="cpu")
            assert accelerated.chunk_rows(wide, Job(dtype=dtype)) == cross_entropy.chunk_rows(W)


def test_long_rows_keep_the_output_and_a_number_a_head() -> None:
    import torch

    from lorakit.ops.attention import forward
    from lorakit.ops.attention_pattern import Pattern

    q = torch.randn(1, 2, accelerated.FLASH_FROM, 8)
    out, sums, _ = forward(q, q, q, Pattern())
    shape = _shape("SmolLM2-135M")
    sites = [
        s for s in count(shape, LoraConfig(target_modules=["q_proj"])).sites if s.path.startswith("model.layers.0.")
    ]
    long, short = (
        accelerated.sublayer_bytes(shape, sites, "attention", 0.0, Job(1, length)) / length
        for length in (accelerated.FLASH_FROM, accelerated.FLASH_FROM // 2)
    )
    assert sums is not None and (out.shape, sums.shape) == (q.shape, q.shape[:3])
    assert long - short == 2 * shape.query_width + 4 * shape.heads


def _shape(name: str) -> ModelShape:
    shape = catalogue.published(name)
    assert shape is not None
    return shape


def _memory(name: str, **fields: Any) -> memory.Memory:
    shape = _shape(name)
    config = LoraConfig(r=16, target_modules="all-linear")
    return memory.of_lora(shape, count(shape, config), 0.0, Job(**{"accelerated": True, **fields}))


def test_smollm2_needs_a_third_above_its_weights() -> None:
    needs, plain = _memory("SmolLM2-135M"), _memory("SmolLM2-135M", accelerated=False)
    assert [line.equation for line in needs.lines] == [20, 21, 23, 22, 29, 35, 99, 26, 98]
    assert needs.above_weights_bytes < 0.36 * plain.above_weights_bytes
    assert "accelerated forward passes (disable with train --no-accelerate). Rows are packed" in needs.notes[1]
    assert plain.notes[1].startswith("Assumes transformers' own forward passes (train --no-accelerate)")


def test_a_base_that_drops_runs_accelerated() -> None:
    needs = _memory("gpt2")
    assert "run unfused" not in needs.notes[1]
    assert "packed" in needs.notes[1]
    assert [line.equation for line in needs.lines][4:6] == [29, 35]


def test_an_architecture_that_was_not_derived_is_planned_unaccelerated() -> None:
    shape = dataclasses.replace(_shape("SmolLM2-135M"), architecture="StrangeForCausalLM")
    counted = count(shape, LoraConfig(target_modules="all-linear"))
    needs, plain = (memory.of_lora(shape, counted, 0.0, Job(accelerated=fast)) for fast in (True, False))
    assert needs.peak_bytes == plain.peak_bytes
    assert needs.notes[1].startswith("The activations of accelerated forward passes are not known")


@pytest.mark.parametrize(
    ("words", "without"),
    [
        ({}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),  # its weight is the head's
    ],
    ids=str,
)
def test_a_head_that_is_trained_makes_logits(words: dict[str, Any], without: bool) -> None:
    shape = _shape("SmolLM2-135M")
    counted = count(shape, LoraConfig(**{"target_modules": ["q_proj"], **words}))
    assert accelerated.skips_logits(shape, counted) is without


def test_padding_takes_time_only_without_acceleration() -> None:
    config, speed = LoraConfig(target_modules="all-linear"), Speed(tokens_per_second=100)
    found = {}
    for name in ("SmolLM2-135M", "gpt2"):
        for fast in (True, False):
            job = Job(4, 100, accumulation=2, accelerated=fast, mean_tokens=50.0)
            found[name, fast] = estimate(_shape(name), config, job, speed).lora.step_seconds
    assert found == {
        ("SmolLM2-135M", True): 4.0,
        ("SmolLM2-135M", False): 8.0,
        ("gpt2", True): 4.0,
        ("gpt2", False): 8.0,
    }
