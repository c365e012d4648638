"""Admission of modules to fused forwards: known classes that agree at every probe, with all they contain."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from lorakit import LoraConfig, core
from lorakit.speed import accelerate, attention, decoder, feed_forward
from lorakit.speed.patching import is_replacement

from ..small_models import bert, gpt2, llama, mistral, mixtral, t5
from .test_acceleration import adapted, close, given, recipes, step
from .test_acceleration_every_architecture import changed, held

BOUND = 1e-5


class DroppingMLP(LlamaMLP):
    """Differs from its parent in training, which no probe shows."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.9, self.training)


class DoublingRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (2 if self.training else 1)


class Renamed(LlamaMLP):
    """Computes the same as its parent."""

    def extra_repr(self) -> str:
        return "renamed"


def with_class(module: nn.Module, kind: type) -> None:
    module.__class__ = kind


def swapped(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if is_replacement(module)}


@pytest.mark.parametrize(
    ("path", "kind", "kept"),
    [
        ("model.layers.1.mlp", DroppingMLP, {"model.layers.1", "model.layers.1.mlp"}),
        ("model.layers.1.input_layernorm", DoublingRMSNorm, {"model.layers.1", "model.layers.1.input_layernorm"}),
    ],
)
def test_a_class_that_replaces_a_forward_keeps_it_and_so_does_what_holds_it(
    path: str, kind: type, kept: set[str]
) -> None:
    model = adapted("llama")
    with_class(model.get_submodule(path), kind)
    theirs, rest = step_seeded(model), kept | {"model.layers.0", "model.layers.1.self_attn"}
    acceleration = accelerate(model)
    assert swapped(model) & rest == {"model.layers.0", "model.layers.1.self_attn"}
    assert {one.path for one in acceleration.skipped if kind.__name__ in one.why} == kept
    close(step_seeded(model), theirs, 2e-5)


def step_seeded(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    return step(model)


def test_a_class_that_replaces_no_method_that_computes_is_known() -> None:
    model = adapted("llama")
    for layer in model.model.layers:
        with_class(layer.mlp, Renamed)
    report = str(accelerate(model))
    assert "2 × Renamed: feed-forward" in report and "2 × LlamaDecoderLayer: decoder layer" in report


def test_a_method_other_than_forward_counts_too() -> None:
    model = adapted("t5")

    class Biased(type(model.encoder.block[0].layer[0].SelfAttention)):  # type: ignore[misc]
        def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().compute_bias(*args, **kwargs) + 1

    with_class(model.encoder.block[0].layer[0].SelfAttention, Biased)
    theirs = step(model)
    acceleration = accelerate(model)
    assert "encoder.block.0.layer.0" not in swapped(model) and "encoder.block.1.layer.0" in swapped(model)
    assert any("Biased" in left.why for left in acceleration.skipped)
    close(step(model), theirs, 2e-5)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_forward_that_was_set_on_a_known_class_is_not_known(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaMLP.forward

    def doubled(self: Any, x: Tensor) -> Tensor:
        return own(self, x) * (2 if self.training else 1)

    monkeypatch.setattr(LlamaMLP, "forward", functools.wraps(own)(doubled) if wrapped else doubled)
    model = adapted("llama")
    theirs = step(model)
    acceleration = accelerate(model)
    assert recipes(acceleration) & {"feed-forward", "decoder layer", "attention"} == {"attention"}
    close(step(model), theirs, 2e-5)


def off(run: Callable[..., Any], when: Callable[[Tensor], bool] = lambda _: True) -> Callable[..., Any]:
    """Return a fused forward of module and hidden states whose results are 10% too large."""

    @functools.wraps(run)
    def made(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = run(module, x, *args, **kwargs)
        return y * 1.1 if y is not None and when(x) else y

    return made


def large(model: Any, factor: float = 200.0) -> Any:
    """Return a model in which the residual is much larger than each branch."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("part", "kept", "fast"),
    [
        (attention.PreparedAttention, {"self_attn", ""}, {"mlp"}),
        (feed_forward.PreparedFeedForward, {"mlp", ""}, {"self_attn"}),
    ],
)
def test_a_layer_does_not_fuse_a_child_whose_probe_differs(
    part: Any, kept: set[str], fast: set[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large(adapted("llama", dtype))
    twin = copy.deepcopy(model).eval()
    monkeypatch.setattr(part, "run", off(part.run))
    acceleration = accelerate(model)
    for layer in ("model.layers.0", "model.layers.1"):
        assert not {f"{layer}.{child}".rstrip(".") for child in kept} & swapped(model)
        assert {f"{layer}.{child}" for child in fast} <= swapped(model)
    whys = [left.why for left in acceleration.skipped if left.kind == "LlamaDecoderLayer"]
    assert len(whys) == 2 and all(why.startswith(f"its {max(kept)}: ") for why in whys)
    ids = given(model)["input_ids"]
    error = (model.eval()(ids).logits - twin(ids).logits).detach().float().norm()
    assert float(error) <= (1e-5 if dtype == torch.float32 else 2e-2) * float(twin(ids).logits.detach().float().norm())


def test_a_layer_that_is_wrong_in_its_branch_alone_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual is much larger than the branch, whose sublayers agree when probed alone."""
    model = large(adapted("llama"), 2e4)
    fed = decoder._fed

    def wrong(layer: Any, around: Any, x: Tensor, *, residual: bool) -> Any:
        return x + 1.01 * fed(layer, around, x, residual=False)

    monkeypatch.setattr(decoder, "_fed", wrong)
    acceleration = accelerate(model)
    assert recipes(acceleration) & {"decoder layer", "attention", "feed-forward"} == {"attention", "feed-forward"}


@pytest.mark.parametrize(("make", "name"), [(bert, "encoder layer"), (t5, "sublayer")])
def test_the_branches_of_other_layers_are_compared_alone(
    make: Callable[[], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a residual and a norm, an attention that is wrong by 5% would pass in bf16."""
    torch.manual_seed(0)
    model = large(make().to(torch.bfloat16).requires_grad_(False), 20.0)
    acceleration = accelerate(model)
    before = sum(recipe == name for recipe, _ in acceleration.swaps)
    acceleration.undo()
    block = attention.attention_block

    def wrong(x: Tensor, modules: Any, pattern: Any, rope: Any, residual: bool, wanted: Any) -> Tensor:
        made: Tensor = 1.05 * block(x, modules, pattern, rope, False, wanted)
        return x + made if residual else made

    monkeypatch.setattr(attention, "attention_block", wrong)
    acceleration = accelerate(model)
    after = sum(recipe == name for recipe, _ in acceleration.swaps)
    assert 0 < before > after
    assert not any(
        "elfAttention" in path or path.endswith(("layer.0", "layer.1")) for path in swapped(model) if make is bert
    )


@pytest.mark.parametrize("tokens", [1, 33])
def test_a_part_that_differs_at_another_length_keeps_its_own_forward(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("mistral")
    run = attention.PreparedAttention.run
    monkeypatch.setattr(attention.PreparedAttention, "run", off(run, lambda x: x.shape[1] == tokens))
    acceleration = accelerate(model)
    assert recipes(acceleration) & {"attention", "decoder layer", "feed-forward"} == {"feed-forward"}
    assert any(f"length {tokens}" in left.why for left in acceleration.skipped)


def test_an_attention_that_is_called_as_a_module_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture-of-experts layer calls its experts; probes of modules inside them do not affect it."""
    acceleration = accelerate(adapted("mixtral"))
    assert "2 × MixtralDecoderLayer: decoder layer" in str(acceleration)


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize(
    "stage", ["keeps_sequences_apart", "last_layer_for", "loss_for", "head_for", "admit", "install", "do"]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_failure_at_any_stage_changes_nothing(
    stage: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.speed import acceleration as accelerating
    from lorakit.speed import loss, patching

    model = adapted("llama")
    before, count = held(model), [0]
    own_loss = model.__dict__.get("_loss_function")
    target, name = {"install": (loss.LossWithoutLogits, stage), "do": (patching.Swap, stage)}.get(
        stage, (accelerating, stage)
    )
    whole = getattr(target, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if stage == "do" and count[0] < 5:
            return whole(*args, **kwargs)
        if stage == "install":
            whole(*args, **kwargs)
        raise error

    monkeypatch.setattr(target, name, failing)
    with pytest.raises(error):
        accelerate(model, logits=False, keep_feed_forward=False)
    assert not changed(before, held(model)) and not swapped(model)
    assert model.__dict__.get("_loss_function") is own_loss
    monkeypatch.undo()
    accelerate(model, logits=False).undo()
    assert not changed(before, held(model))


def test_undo_gives_back_a_loss_function_that_was_set_on_the_model() -> None:
    model = adapted("llama")
    own = model.loss_function
    model.loss_function = own
    acceleration = accelerate(model, logits=False)
    assert acceleration.loss is not None and model.loss_function is acceleration.loss
    acceleration.undo()
    assert model.__dict__["_loss_function"] is own


@pytest.mark.costly(cases=2)
@pytest.mark.parametrize("make", [llama, gpt2, mixtral, mistral, t5, bert])
def test_an_unfrozen_model_is_accelerated_before_it_has_adapters(make: Callable[[], Any]) -> None:
    """While its weights are trained its own forwards run, with their gradients; then adapters freeze them."""
    torch.manual_seed(0)
    model = make().train()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    twin = copy.deepcopy(model)
    acceleration = accelerate(model)
    frozen = accelerate(twin.requires_grad_(False))
    assert acceleration.swaps and [recipe for recipe, _ in acceleration.swaps] == [r for r, _ in frozen.swaps]
    frozen.undo()
    twin.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    close(step(model), step(twin), 2e-5)
    for one in (model, twin):
        core.attach(one, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    ours, theirs = step(model), step(twin)
    assert any("lora_A" in name for name in ours[1])
    close(ours, theirs, 2e-5)


def test_its_fast_forwards_run_once_it_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = llama(use_cache=False).train()
    accelerate(model)
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    step(model)


@pytest.mark.parametrize("shape", [(0, 9, 32), (2, 0, 32)])
def test_empty_batches_of_the_parts(shape: tuple[int, ...]) -> None:
    model = adapted("llama")
    layer = model.model.layers[0]
    parts: list[Any] = [
        layer.mlp,
        layer.input_layernorm,
        layer.self_attn.q_proj,
        adapted("gpt2_dropping").transformer.drop,
    ]
    for part in parts:
        x = torch.zeros(shape, requires_grad=True)
        theirs = part(x)
        theirs.sum().backward()
        acceleration = accelerate(model)
        ours = part(x)
        ours.sum().backward()
        assert ours.shape == theirs.shape and x.grad is not None and x.grad.shape == x.shape
        acceleration.undo()


@pytest.mark.parametrize("logits", [True, False])
def test_an_empty_batch_of_a_model_that_takes_one(logits: bool) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes)).train()
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    ids = torch.zeros(0, 9, dtype=torch.long)
    theirs = model(input_ids=ids, labels=ids)
    accelerate(model, logits=logits)
    ours = model(input_ids=ids, labels=ids)
    ours.loss.backward()
    assert ours.logits.shape == theirs.logits.shape and ours.loss.isnan() and theirs.loss.isnan()


@pytest.mark.parametrize("borrowed", [True, False])
def test_a_class_of_the_users_own_is_known_only_by_its_source(borrowed: bool) -> None:
    """A class with the structure and values of a known one, and possibly its forward."""

    class OwnAttention(nn.Module):
        def __init__(self, like: LlamaAttention) -> None:
            super().__init__()
            self.__dict__.update(like.__dict__)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return LlamaAttention.forward(self, *args, **kwargs)  # type: ignore[arg-type]

    if borrowed:
        OwnAttention.forward = LlamaAttention.forward  # type: ignore[method-assign,assignment]
    model = adapted("llama")
    for layer in model.model.layers:
        layer.self_attn = OwnAttention(layer.self_attn)
    theirs = step(model)
    acceleration = accelerate(model)
    assert bool(recipes(acceleration) & {"decoder layer", "attention"}) is borrowed
    close(step(model), theirs, 2e-5)


def test_a_layers_forward_that_transformers_wraps_is_looked_into() -> None:
    """It wraps the forwards of all subclasses of its layers, including those of users."""

    class Doubling(LlamaDecoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * (2 if self.training else 1)

    model = adapted("llama")
    for layer in model.model.layers:
        with_class(layer, Doubling)
    theirs = step(model)
    assert "decoder layer" not in recipes(accelerate(model))
    close(step(model), theirs, 2e-5)
