"""Arrow: models of both libraries with a router over the same saved adapters have the same outputs, gradients and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit.peft as ours
from lorakit.errors import MergeError

from .architectures import inputs_for, loss_of, model_named, outputs_of
from .closeness import assert_close, assert_differs
from .rows import quiet_peft, theirs

TARGETS = {
    "sequential": ["up", "head"],
    "llama-words": ["q_proj", "down_proj"],
    "gpt2-words": ["c_attn", "c_proj"],
}
SETTINGS = {"top_k": 2, "router_temperature": 0.5, "rng_seed": 3}

Made = Callable[..., tuple[Any, Any]]


@pytest.fixture(params=TARGETS)
def make(request: Any, tmp_path: Path) -> Made:
    """Function that saves adapters with peft and returns the router of each library: (peft's, ours)."""

    def saved(index: int) -> str:
        torch.manual_seed(index)
        config = theirs.LoraConfig(r=3, lora_alpha=2 + index, target_modules=TARGETS[request.param])
        with quiet_peft():
            model = theirs.get_peft_model(model_named(request.param), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        with quiet_peft():
            model.save_pretrained(tmp_path / str(index))
        return str(tmp_path / str(index))

    def made(experts: int = 3, general: int = 0, **more: Any) -> tuple[Any, Any]:
        paths = [saved(index) for index in range(experts + general)]
        with quiet_peft():
            models = []
            for library in (theirs, ours):
                config = library.ArrowConfig(**{**SETTINGS, **more, "use_gks": bool(general)})
                model = library.create_arrow_model(
                    model_named(request.param), paths[:experts], config, paths[experts:] or None
                )
                models.append(model.eval())
        return models[0], models[1]

    made.inputs = inputs_for(request.param)  # type: ignore[attr-defined]
    made.plain = lambda: outputs_of(model_named(request.param)(**made.inputs))  # type: ignore[attr-defined]
    made.saved = saved  # type: ignore[attr-defined]
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("general", [0, 2])
def test_outputs_and_gradients(make: Any, general: int) -> None:
    models = make(3, general)
    assert list(models[1].peft_config) == list(models[0].peft_config)
    assert models[1].active_adapters == models[0].active_adapters == ["arrow_router"]
    assert {n for n, p in models[1].named_parameters() if p.requires_grad} == {
        n for n, p in models[0].named_parameters() if p.requires_grad
    }
    found = []
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name and ".task_" in name)
        result = model(**make.inputs)
        loss_of(result).backward()
        found.append(outputs_of(result))
    assert_close(found[1], found[0])
    assert_differs(found[1], make.plain())
    expected = gradients(models[0])
    assert len(expected) == 3 * 2 * sum("lora_A.task_0" in name for name in expected)
    assert_close(gradients(models[1]), expected, rtol=4e-5)


def test_without_a_seed_the_prototypes_are_drawn_like_peft_s(make: Any) -> None:
    found = []
    for model in make(3, rng_seed=None):
        torch.manual_seed(1)
        found.append(outputs_of(model(**make.inputs)))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("general", [0, 1])
def test_an_expert_may_be_added_later_and_used_alone(make: Any, general: int) -> None:
    models = make(2, general)
    path, results = make.saved(7), []
    for model in models:
        seen = [model(**make.inputs)]
        with quiet_peft():
            model.load_adapter(path, adapter_name="later")
        model.eval()
        model.set_adapter("arrow_router")
        seen.append(model(**make.inputs))
        if not general:  # peft subtracts in place, so the experts themselves differ
            model.set_adapter("task_1")
            seen.append(model(**make.inputs))
            model.set_adapter("arrow_router")
            seen.append(model(**make.inputs))
        results.append([outputs_of(one) for one in seen])
    for one, other in zip(*results, strict=True):
        assert_close(other, one)
    assert_differs(results[1][0], results[1][1])


def test_files(make: Any, tmp_path: Path) -> None:
    models = make(2)
    with quiet_peft():
        for model, name in zip(models, ("peft", "lorakit"), strict=True):
            model(**make.inputs)
            model.save_pretrained(tmp_path / name)
    for folder in ("task_0", "task_1", "arrow_router"):
        one, other = (tmp_path / name / folder for name in ("peft", "lorakit"))
        given, found = (load_file(where / "adapter_model.safetensors") for where in (one, other))
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in given.items()}
        if folder != "arrow_router":  # its A is random and not used
            assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
        configs = [json.loads((where / "adapter_config.json").read_text()) for where in (one, other)]
        for field in ("arrow_config", "r", "lora_alpha", "peft_type", "inference_mode"):
            assert configs[1][field] == configs[0][field], field
        assert sorted(configs[1]["target_modules"]) == sorted(configs[0]["target_modules"])
    again = ours.PeftModel.from_pretrained(models[1].unload(), tmp_path / "peft" / "task_0", adapter_name="task_0")
    for name in ("task_1", "arrow_router"):
        again.load_adapter(tmp_path / "lorakit" / name, adapter_name=name)
    again.set_adapter("arrow_router")
    assert_close(outputs_of(again.eval()(**make.inputs)), outputs_of(models[0](**make.inputs)))


def test_a_router_is_not_merged(make: Any) -> None:
    models = make(2)
    models[0](**make.inputs)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
        models[0].merge_adapter()
    before = outputs_of(models[1](**make.inputs))
    with pytest.raises(MergeError, match="is Arrow, which cannot be merged") as refused:
        models[1].merge_adapter()
    assert isinstance(refused.value, RuntimeError)
    assert_close(outputs_of(models[1](**make.inputs)), before)
