"""The derived activations compared with what autograd saves, counted with saved-tensor hooks over lorakit's layers."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.plan import Job, accelerated, activations, catalogue, count
from lorakit.plan.memory import logits_bytes

ROWS, LENGTH, LAYERS = 2, 48, 12


def _model(name: str, dropout: float) -> Any:
    import transformers as hf

    small = {"hidden_size": 64, "num_hidden_layers": LAYERS, "vocab_size": 300, "intermediate_size": 160}
    if name == "gpt2":
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=300, n_embd=64, n_layer=LAYERS, n_head=4, **drops, **ids))
    if name == "bert":
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return hf.BertModel(hf.BertConfig(**small, num_attention_heads=4, **drops))
    if name == "gemma3":
        config = hf.Gemma3TextConfig(**small, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        return hf.Gemma3ForCausalLM(config)
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[name]
    config = getattr(hf, f"{family}Config")(
        **small, num_attention_heads=4, num_key_value_heads=2, **({} if name == "qwen2" else {"head_dim": 16})
    )
    return getattr(hf, f"{family}ForCausalLM")(config)


def _saved_bytes(model: Any, ids: Any) -> int:
    """Return the bytes of distinct storages in the graph, without parameters and buffers."""
    import torch

    plain = (t for t in (*model.parameters(), *model.buffers()) if not hasattr(t, "__tensor_flatten__"))
    own = {t.untyped_storage().data_ptr() for t in plain}  # a quantizer's own tensor class has no storage
    held: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = tensor
        return tensor

    causal = "labels" if hasattr(model, "lm_head") else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, **({causal: ids, "use_cache": False} if causal else {}))
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize(("lora_dropout", "use_dora"), [(0.0, False), (0.1, True)], ids=["plain", "dropout-dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "dropout", "targets"),
    [
        ("llama", 0.0, "all-linear"),
        ("llama", 0.0, ["q_proj", "v_proj"]),
        ("qwen2", 0.0, "all-linear"),
        ("qwen3", 0.0, "all-linear"),
        ("gemma3", 0.0, "all-linear"),
        ("gpt2", 0.1, ["c_attn", "c_proj"]),
        ("gpt2", 0.1, "all-linear"),
        ("gpt2", 0.0, ["c_attn", "c_proj"]),
        ("bert", 0.1, ["query", "value"]),
        ("bert", 0.0, "all-linear"),
    ],
    ids=str,
)
def test_what_autograd_saves(
    name: str, dropout: float, targets: Any, dtype: str, lora_dropout: float, use_dora: bool
) -> None:
    import torch

    from lorakit import core, hub

    model = _model(name, dropout).to(getattr(torch, dtype))
    shape = hub.shape_of_module(model, "small", "here")
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=lora_dropout, use_dora=use_dora)
    core.attach(model, config)
    model.train()
    saved = _saved_bytes(model, torch.randint(0, 300, (ROWS, LENGTH)))
    job = Job(ROWS, LENGTH, dtype=dtype)
    planned = activations.of_lora(shape, count(shape, config), lora_dropout, job)
    log_probabilities = logits_bytes(shape, job) // 3  # one of the three tensors of the loss is saved in the forward
    assert planned.is_known
    assert planned.blocks + planned.outside + log_probabilities == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_samples", [2, 8])
def test_the_samples_of_monteclora(num_samples: int, dtype: str) -> None:
    import torch

    from lorakit import core, hub

    model = _model("llama", 0.0).to(getattr(torch, dtype))
    shape = hub.shape_of_module(model, "small", "here")
    config = LoraConfig(r=4, target_modules="all-linear", monteclora_config={"num_samples": num_samples})
    core.attach(model, config)
    saved = _saved_bytes(model.train(), torch.randint(0, 300, (ROWS, LENGTH)))
    job = Job(ROWS, LENGTH, dtype=dtype)
    planned = activations.of_lora(shape, count(shape, config), 0.0, job)
    log_probabilities = logits_bytes(shape, job) // 3
    assert planned.blocks + planned.outside + log_probabilities == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn", "c_proj"])], ids=str)
def test_a_frozen_factor_keeps_no_input(name: str, targets: Any, dtype: str, lora_dropout: float) -> None:
    import torch

    from lorakit import core, hub
    from lorakit.core.optimizers import freeze_factors

    model = _model(name, 0.0).to(getattr(torch, dtype))
    shape = hub.shape_of_module(model, "small", "here")
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=lora_dropout)
    core.attach(model, config)
    freeze_factors(model)
    model.train()
    saved = _saved_bytes(model, torch.randint(0, 300, (ROWS, LENGTH)))
    job = Job(ROWS, LENGTH, dtype=dtype, optimizer="lorafa")
    both = [
        activations.of_lora(shape, count(shape, config, optimizer=o), lora_dropout, job) for o in ("lorafa", "adamw")
    ]
    log_probabilities = logits_bytes(shape, job) // 3
    assert both[0].blocks + both[0].outside + log_probabilities == pytest.approx(saved, rel=0.03)
    assert both[0].blocks < both[1].blocks


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize(("name", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn", "c_proj"])], ids=str)
def test_a_frozen_b_still_keeps_the_input_of_a(name: str, targets: Any, lora_dropout: float) -> None:
    import torch

    from lorakit import core, hub

    model = _model(name, 0.0)
    shape = hub.shape_of_module(model, "small", "here")
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=lora_dropout, init_lora_weights="mica")
    core.attach(model, config)
    model.train()
    saved = _saved_bytes(model, torch.randint(0, 300, (ROWS, LENGTH)))
    job = Job(ROWS, LENGTH, dtype="float32")
    planned = activations.of_lora(shape, count(shape, config), lora_dropout, job)
    assert planned.blocks + planned.outside + logits_bytes(shape, job) // 3 == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], ["q_proj.weight"]], ids=str
)
def test_experts_and_bare_matrices_are_reckoned_nearly(parameters: list[str], lora_dropout: float, dtype: str) -> None:
    """No architecture with experts was derived, so the total is an estimate; the adapter's part is close."""
    import torch
    import transformers as hf

    from lorakit import core, hub

    if lora_dropout and "q_proj.weight" in parameters:
        return  # its input is not subject to dropout
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 300, "intermediate_size": 160, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "experts_implementation": "eager"}
    saved, planned = [], []
    for fields in ({"target_modules": ["k_proj"]}, {"target_modules": ["k_proj"], "target_parameters": parameters}):
        made = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))
        model = made.to(getattr(torch, dtype))
        shape, job = hub.shape_of_module(model, "small", "here"), Job(ROWS, LENGTH, dtype=dtype)
        config = LoraConfig(r=4, lora_dropout=lora_dropout if "target_parameters" in fields else 0.0, **fields)
        core.attach(model, config)
        model.train()
        saved.append(_saved_bytes(model, torch.randint(0, 300, (ROWS, LENGTH))))
        found = activations.of_lora(shape, count(shape, config), config.lora_dropout, job)
        planned.append(found.blocks + found.outside + logits_bytes(shape, job) // 3)
    assert not found.is_known
    assert planned[1] == pytest.approx(saved[1], rel=0.2)
    first = 4 if "q_proj.weight" in parameters else 10**9  # of 4 layers, the first has no ∂L/∂x and saves no W
    assert planned[1] - planned[0] == pytest.approx((saved[1] - saved[0]) * first / (first - 1), rel=0.2)


def test_blocks_below_the_first_adapted_one_keep_nothing() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[20, 25])
    planned = activations.of_lora(shape, count(shape, config), 0.0, Job())
    assert planned.blocks_kept == 10


def test_an_unknown_architecture_is_reckoned_as_the_nearest_and_says_so() -> None:
    import dataclasses

    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    strange = dataclasses.replace(shape, architecture="StrangeForCausalLM")
    family = accelerated.family_of(strange)
    assert (family.title[:5], family.is_known) == ("Llama", False)
    family = accelerated.family_of(dataclasses.replace(strange, gated=False))
    assert (family.title[:5], family.is_known) == ("GPT-2", False)
    family = accelerated.family_of(dataclasses.replace(strange, gated=False, causal=False))
    assert (family.title[:4], family.is_known) == ("BERT", False)
