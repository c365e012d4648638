"""Small models with experts, and pairs of adapters on them: one of the installed peft, one of lorakit."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lorakit.peft as ours

from ..speed.architectures import build, inputs, small_settings

theirs = pytest.importorskip("peft")


@dataclass(frozen=True)
class Family:
    """One architecture with experts.

    Attributes:
        kind: Its `model_type`.
        name: Its class in transformers.
        old: Names of the expert modules and of the router in transformers 4, or () if peft converts none.
        changes: Values of the config that replace those of the small model.
    """

    kind: str
    name: str
    old: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.kind

    def model(self) -> Any:
        """Return a small model; each call gives the same weights."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(self.kind, self.name, small_settings(self.kind, self.name) | self.changes)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():  # some weights are zero at first
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model


OF_MIXTRAL = ("w1", "w2", "w3", "gate")
OF_QWEN = ("gate_proj", "up_proj", "down_proj", "gate")
ONE_DENSE_LAYER = {"first_k_dense_replace": 1}

FAMILIES = (
    Family("mixtral", "MixtralForCausalLM", OF_MIXTRAL),
    Family("minimax", "MiniMaxForCausalLM", OF_MIXTRAL),
    Family("qwen2_moe", "Qwen2MoeForCausalLM"),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", OF_QWEN),
    Family("qwen3_next", "Qwen3NextForCausalLM", OF_QWEN),
    Family("olmoe", "OlmoeForCausalLM", OF_QWEN),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", OF_QWEN),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", OF_QWEN, ONE_DENSE_LAYER | {"mlp_layer_types": None}),
    Family("glm4_moe", "Glm4MoeForCausalLM", OF_QWEN),
    Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", OF_QWEN[:3]),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", OF_QWEN),
    Family("gpt_oss", "GptOssForCausalLM"),
    Family("granitemoe", "GraniteMoeForCausalLM"),
)
"""The families on which peft works."""

WITH_TUPLES = (Family("llama4_text", "Llama4ForCausalLM"), Family("phimoe", "PhimoeForCausalLM"))
"""Families whose routers are linear modules that return tuples; peft fails on them."""

BY_KIND = {family.kind: family for family in (*FAMILIES, *WITH_TUPLES)}
SAMPLE = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
"""Families in `make test`."""


def each(families: tuple[Family, ...]) -> list[Any]:
    """Return the families as parameters of a test; those outside the sample are slow."""
    return [pytest.param(one, id=one.kind, marks=() if one.kind in SAMPLE else (pytest.mark.slow,)) for one in families]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress all warnings within a context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrapped(library: Any, family: Family, **fields: Any) -> Any:
    """Return a small model, wrapped by a library with a config of these fields."""
    copied = {key: type(value)(value) if isinstance(value, (list, dict)) else value for key, value in fields.items()}
    with quiet():
        return library.get_peft_model(family.model(), library.LoraConfig(**{"r": 2, "lora_alpha": 6} | copied))


def trained(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a wrapped model trains."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def randomise(model: nn.Module) -> None:
    """Give each trained tensor values that depend on its name order only."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def pair(family: Family, **fields: Any) -> tuple[Any, Any]:
    """Return a model of each library with equal values in its adapter: (peft's, ours)."""
    made = wrapped(theirs, family, **fields), wrapped(ours, family, **fields)
    for model in made:
        randomise(model)
        model.eval()
    return made


def loss_and_logits(model: Any) -> tuple[Tensor, Tensor]:
    """Return the loss, with that of the router if the model has one, and the logits of a batch."""
    given = inputs(model, 9)
    if hasattr(model.config, "output_router_logits") and hasattr(model.config, "router_aux_loss_coef"):
        given["output_router_logits"] = True
    with quiet():
        found = model(**given, labels=given["input_ids"])
    return found.loss, found.logits


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradient of each trained tensor."""
    model.zero_grad()
    loss_and_logits(model)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def old_tensors(family: Family, alone: bool = False) -> dict[str, Tensor]:
    """Return the tensors of an adapter of rank 2 on attention, experts and router, as transformers 4 named them.

    Args:
        family: One with `old` names.
        alone: Whether the adapter has only the experts and the router.
    """
    model, generator = family.model(), torch.Generator().manual_seed(7)
    block = "block_sparse_moe" if "w1" in family.old else "mlp"
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if path.endswith(".q_proj") and not alone:
            sizes[path] = tuple(module.weight.shape)
        if path.endswith(".mlp.experts"):
            around = path.removesuffix("mlp.experts") + block
            number, both, width = module.gate_up_proj.shape
            gate, up, down = ("w1", "w3", "w2") if "w1" in family.old else ("gate_proj", "up_proj", "down_proj")
            for one in range(number):
                sizes |= {f"{around}.experts.{one}.{name}": (both // 2, width) for name in (gate, up)}
                sizes[f"{around}.experts.{one}.{down}"] = (width, both // 2)
            if "gate" in family.old:
                sizes[f"{around}.gate"] = (number, width)
    found = {}
    for path, (rows, columns) in sizes.items():
        for part, size in (("A", (2, columns)), ("B", (rows, 2))):
            found[f"base_model.model.{path}.lora_{part}.weight"] = 0.2 * torch.randn(size, generator=generator)
    return found


def write_old(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """Write an adapter of rank 2 as peft did under transformers 4, and return its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "inference_mode": True} | fields
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder
