"""Models with experts in the catalog: counts equal peft's on the real sizes; active parameters; memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.architectures.shapes import ModelShape
from lorakit.config import LoraConfig
from lorakit.plan import Job, catalogue, count, estimate

from ..peft.experts import quiet
from .test_catalogue import on_meta

NAMES = ("Mixtral-8x7B-v0.1", "Qwen3-30B-A3B", "OLMoE-1B-7B-0924", "gpt-oss-20b", "gpt-oss-120b", "GLM-4.5-Air")
BARE = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
OF_QWEN = {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}
TARGETS: dict[str, list[dict[str, Any]]] = {
    "Mixtral-8x7B-v0.1": [{"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}],
    "gpt-oss-20b": [],
    "gpt-oss-120b": [],
}


def shape_of(name: str) -> ModelShape:
    shape = catalogue.published(name)
    assert shape is not None
    return shape


CASES = [
    (name, {"r": 8, "lora_alpha": 16, **fields})
    for name in NAMES
    for fields in ({"target_modules": "all-linear"}, BARE, *TARGETS.get(name, [OF_QWEN]))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_the_trained_parameters_are_those_of_peft(name: str, fields: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    shape = shape_of(name)
    with quiet():
        model = peft.get_peft_model(on_meta(shape), peft.LoraConfig(**fields), low_cpu_mem_usage=True)
    trained, total = model.get_nb_trainable_parameters()
    counted = count(shape, LoraConfig(**fields))
    assert counted.trainable == trained
    assert counted.base == shape.parameters == total - trained


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Mixtral-8x7B-v0.1", 46.7, 12.9),
        ("Mixtral-8x22B-v0.1", 140.6, 39),
        ("Qwen3-30B-A3B", 30.5, 3.3),
        ("Qwen3-235B-A22B", 235, 22),
        ("OLMoE-1B-7B-0924", 6.9, 1.3),
    ],
)
def test_total_and_active_parameters_are_the_published_ones(name: str, total: float, active: float) -> None:
    """The publications round, or cut off digits."""
    shape = shape_of(name)
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_active_parameters_without_the_embedding_are_those_of_the_model_card() -> None:
    """OpenAI counts the output head, but not the embedding."""
    for name, active in (("gpt-oss-20b", "3.61"), ("gpt-oss-120b", "5.13")):
        shape = shape_of(name)
        assert f"{(shape.active_parameters - shape.vocab * shape.hidden) / 1e9:.2f}" == active


def test_every_parameter_of_a_dense_model_is_active() -> None:
    shape = shape_of("Llama-3.2-1B")
    assert shape.active_parameters == shape.parameters


def test_weights_of_all_experts_and_activations_of_the_routed_rows() -> None:
    shape, config = shape_of("Qwen3-30B-A3B"), LoraConfig(r=8, target_modules=["q_proj"])
    job = Job(batch_rows=1, length_tokens=128, dtype="bfloat16", accelerated=False)
    planned = estimate(shape, config, job).lora.memory
    assert planned.bytes_of("weights") == 2 * shape.parameters
    per_token = 2 * 8 * (3 * 768 + 2048)
    assert planned.bytes_of("activations") > shape.layers * job.batch_tokens * per_token


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("experts", [4, 16])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "w1", "w2", "w3"]], ids=["attention", "experts"])
def test_activations_are_about_what_autograd_saves(experts: int, targets: list[str]) -> None:
    """The model is not a planned architecture, so the estimate is approximate; it follows the rows, not the experts."""
    from lorakit import core
    from lorakit.hub.shapes import shape_of_module

    from .. import small_models

    torch.manual_seed(0)
    model = small_models.mixtral(num_local_experts=experts, hidden_size=64, intermediate_size=96).train()
    config = LoraConfig(r=4, target_modules=targets)
    job = Job(batch_rows=2, length_tokens=64, dtype="float32", accelerated=False)
    planned = estimate(shape_of_module(model, "small", "test"), config, job).lora.memory.bytes_of("activations")
    core.attach(model, config)
    assert 0.8 < planned / saved_by(model, job) < 1.25


def saved_by(model: Any, job: Job) -> int:
    """Return the bytes that autograd saves in a forward pass up to the last hidden states, without parameters."""
    held = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 57, (job.batch_rows, job.length_tokens), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert out.requires_grad
    return sum(found.values())
