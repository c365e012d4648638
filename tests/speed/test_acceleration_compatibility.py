"""An accelerated model under autocast, inference mode and compilers, and allowed changes afterwards."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lorakit import LoraConfig, core
from lorakit.speed import accelerate

from .test_acceleration import adapted, close, given, recipes, step


def lora(**words: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **words})


# ---- autocast and inference mode


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_under_autocast_it_is_as_near_to_the_truth_as_the_model_itself(name: str) -> None:
    truth = step(adapted(name, torch.float64))
    model = adapted(name)

    def error(found: tuple[Tensor, dict[str, Tensor]]) -> float:
        return sum(float((found[1][k].double() - g).norm() / g.norm()) for k, g in truth[1].items()) / len(truth[1])

    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
        accelerate(model)
        ours = step(model)
    assert error(theirs) > 1e-3  # bf16 is in use
    assert error(ours) <= 1.4 * error(theirs)
    assert {key: g.dtype for key, g in ours[1].items()} == {key: g.dtype for key, g in theirs[1].items()}


def test_under_autocast_the_recipes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(
            nn.functional, "scaled_dot_product_attention", None
        )  # would be called by the model's own forward
        step(model)


def test_double_precision_stays_under_autocast() -> None:
    model = adapted("llama", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
        accelerate(model)
        close(step(model), theirs, 1e-9)


def test_inference_mode() -> None:
    model = adapted("llama").eval()
    ids = given(model)["input_ids"]
    with torch.inference_mode():
        theirs = model(input_ids=ids).logits
        accelerate(model)
        ours = model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    step(model.train())  # no inference tensors remain in the model


# ---- compilers


def graphs(fast: bool) -> tuple[list[Tensor], int]:
    """Return logits with two adapters, and how many graphs were compiled."""
    torch._dynamo.reset()
    model = adapted("llama").eval()
    core.attach(model, lora(), "b", seed=5)
    if fast:
        accelerate(model, logits=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, found = torch.compile(model, fullgraph=True, backend=counter), []
    with torch.no_grad():
        for name in ("default", "b", "default"):
            core.activate(model, name)
            found.append(compiled(input_ids=given(model)["input_ids"], use_cache=False).logits)
    torch._dynamo.reset()
    return found, counter.frame_count


@pytest.mark.slow
def test_a_whole_graph_without_more_compiling_than_the_plain_model() -> None:
    theirs, plain = graphs(fast=False)
    ours, fast = graphs(fast=True)
    assert fast <= plain
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("logits", [True, False])
def test_a_compiled_step_has_the_same_gradients(logits: bool) -> None:
    torch._dynamo.reset()
    model = adapted("llama")
    theirs = step(model)
    accelerate(model, logits=logits)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**given(model), use_cache=False).loss
    loss.backward()
    close((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), theirs, 2e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore")
def test_inductor() -> None:
    torch._dynamo.reset()
    model = adapted("llama").eval()
    ids = given(model)["input_ids"]
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        accelerate(model)
        ours = torch.compile(model, fullgraph=True)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# ---- changes to the model afterwards


def attached(model: Any, _: Path) -> Any:
    core.attach(model, lora(r=2, target_modules=["q_proj", "up_proj"]), "b", seed=7)
    core.activate(model, "b")
    return model


def detached(model: Any, _: Path) -> Any:
    core.detach(model, "default")
    assert not any(isinstance(module, core.LoraLayer) for module in model.modules())
    return model


def loaded(model: Any, folder: Path) -> Any:
    core.load_adapter(model, folder, name="b")
    core.activate(model, "b")
    return model


def merged(model: Any, _: Path) -> Any:
    core.merge(model, "default")
    return model


def merged_for_good(model: Any, _: Path) -> Any:
    core.merge_and_unload(model)
    return model


CHANGES: dict[str, Callable[[Any, Path], Any]] = {
    made.__name__: made for made in (attached, detached, loaded, merged, merged_for_good)
}
CHANGES["cast"] = lambda model, _: model.to(torch.bfloat16).to(torch.float64)
CHANGES["copied"] = lambda model, _: copy.deepcopy(model)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_afterwards_is_as_without(change: str, held: bool, tmp_path: Path) -> None:
    other = adapted("llama")
    core.attach(other, lora(r=3), "x", seed=11)
    core.save_adapter(other, tmp_path, "x")
    found = []
    for fast in (False, True):
        model = adapted("llama").eval()
        ids = given(model)["input_ids"]
        acceleration = accelerate(model) if fast else None
        if not held:
            del acceleration  # removes the originals
        model = CHANGES[change](model, tmp_path)
        found.append((model(input_ids=ids).logits, {n: p.requires_grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert found[1][1] == found[0][1]


def test_undoing_after_all_that_leaves_what_came_in_between() -> None:
    model = adapted("llama").eval()
    acceleration = accelerate(model)
    core.attach(model, lora(r=2), "b", seed=7)
    core.detach(model, "default")
    core.activate(model, "b")
    ids = given(model)["input_ids"]
    wanted = model(input_ids=ids).logits
    acceleration.undo()
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    core.detach(model, "b")
    assert not any(isinstance(module, core.LoraLayer) for module in model.modules())


def test_adapters_that_come_afterwards_take_part() -> None:
    torch.manual_seed(0)
    model = adapted("llama")
    core.detach(model, "default")
    accelerate(model)
    core.attach(model, lora(), "b", seed=7)
    ours = step(model)
    plain = adapted("llama")
    core.detach(plain, "default")
    core.attach(plain, lora(), "b", seed=7)
    close(ours, step(plain), 2e-5)


def test_a_forward_on_the_instance_is_called() -> None:
    model = adapted("llama")
    theirs = step(model)
    accelerate(model)
    seen: list[str] = []
    for path in ("model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.0.mlp.up_proj.base_layer"):
        module = model.get_submodule(path)

        def forward(*args: Any, path: str = path, module: Any = module, **kwargs: Any) -> Any:
            seen.append(path)
            return type(module).forward(module, *args, **kwargs)

        module.forward = forward
    close(step(model), theirs, 2e-5)
    assert sorted(seen) == ["model.layers.0.mlp.up_proj.base_layer", "model.layers.0.self_attn", "model.layers.1.mlp"]


def test_hooks_on_the_parts_of_a_layer_are_called() -> None:
    model = adapted("llama")
    accelerate(model)
    seen: list[str] = []
    for path in ("model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.1.input_layernorm"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    step(model)
    assert sorted(seen) == ["model.layers.0.self_attn", "model.layers.1.input_layernorm", "model.layers.1.mlp"]


def test_the_hooks_of_a_device_map_are_called() -> None:
    hooks = pytest.importorskip("accelerate")
    model = adapted("llama")
    theirs = step(model)
    accelerate(model)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    hooks.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    assert "forward" in model.model.layers[0].__dict__
    close(step(model), theirs, 2e-5)


def test_what_casts_in_between_is_refused_as_before() -> None:
    model = adapted("llama").to(torch.bfloat16)
    accelerate(model)
    model.model.layers[1].float()
    plain = adapted("llama").to(torch.bfloat16)
    plain.model.layers[1].float()
    for one in (plain, model):
        with pytest.raises(RuntimeError, match="dtype"):
            step(one)


def test_a_model_of_unknown_blocks_takes_the_linear_op() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(61, 8)
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 61)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: Tensor) -> Tensor:
            made: Tensor = self.second(self.first(self.embedding(input_ids)).sin())
            return made

    torch.manual_seed(0)
    model = Odd()
    core.attach(model, LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False), seed=1)
    ids = torch.arange(8).view(2, 4)
    theirs = model(ids)
    acceleration = accelerate(model)
    assert recipes(acceleration) == {"adapted linear"}
    torch.testing.assert_close(model(ids), theirs, rtol=1e-5, atol=1e-6)


def test_modules_called_by_keyword_run_their_own_forwards() -> None:
    model = adapted("llama")
    x, layer = torch.randn(1, 2, 32), model.model.layers[0]
    calls = {"self_attn.q_proj": "input", "input_layernorm": "hidden_states", "mlp": "x"}
    theirs = {path: layer.get_submodule(path)(**{name: x}) for path, name in calls.items()}
    accelerate(model)
    for path, name in calls.items():
        made = model.model.layers[0].get_submodule(path)(**{name: x})
        torch.testing.assert_close(made, theirs[path], rtol=1e-4, atol=1e-5)
