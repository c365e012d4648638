"""Changes to a model before or after `accelerate` have the same effect as on the plain model."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention
from transformers.loss import loss_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.qwen3 import modeling_qwen3
from transformers.pytorch_utils import Conv1D

from lorakit import LoraConfig, core
from lorakit.speed import accelerate
from lorakit.speed.acceleration import pack_rows

from ..small_models import GROUPED
from .test_acceleration import PACKING, adapted

Change = Callable[[Any], None]

IDS = torch.randint(2, 61, (2, 12), generator=torch.Generator().manual_seed(5))
PADDING = torch.ones_like(IDS).index_fill_(1, torch.tensor([10, 11]), 0)


def with_adapter(model: Any) -> Any:
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    return model.train()


def results(model: Any, **call: Any) -> dict[str, Tensor]:
    """Return logits and gradients of one step."""
    model.zero_grad()
    words = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=IDS, **words, **call).logits
    logits.double().square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return {**found, "logits": logits.detach()}


def are_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(float((ours[key] - one).norm()) <= 3e-5 * float(one.norm()) + 1e-9 for key, one in theirs.items())


def check(model: Any, change: Change, before: dict[str, Any] | None = None, **call: Any) -> None:
    """Apply a change to an accelerated model and to its plain copy, and compare them.

    Args:
        model: A plain model with an adapter.
        change: Applied to both, after one of them is accelerated.
        before: Arguments of the call in which the change must have an effect; those of `call` by default.
        call: Arguments of the compared call.
    """
    plain = copy.deepcopy(model)
    unchanged = results(plain, **(call if before is None else before))
    assert accelerate(model).swaps
    assert are_close(results(model, **(call if before is None else before)), unchanged)
    change(model)
    change(plain)
    theirs = results(plain, **call)
    assert not are_close(theirs, unchanged), "the change does not act"
    assert are_close(results(model, **call), theirs)


def nothing(_: Any) -> None:
    """Change nothing."""


def named(model: Any, name: str) -> list[Any]:
    return [module for path, module in model.named_modules() if path.split(".")[-1] == name]


def set_on(name: str, attribute: str, value: Any) -> Change:
    def change(model: Any) -> None:
        assert named(model, name)
        for module in named(model, name):
            setattr(module, attribute, value)

    return change


def set_on_config(attribute: str, value: Any) -> Change:
    return lambda model: setattr(model.config, attribute, value)


# ---- the direction of attention


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "neox", "opt", "mixtral"])
def test_a_decoder_made_bidirectional_by_its_modules(name: str) -> None:
    attention = {"gpt2": "attn", "neox": "attention"}.get(name, "self_attn")
    check(adapted(name), set_on(attention, "is_causal", False))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_decoder_made_bidirectional_by_its_config(name: str) -> None:
    check(adapted(name), set_on_config("is_causal", False), attention_mask=PADDING)


def test_a_decoder_made_bidirectional_by_config_without_padding() -> None:
    """Eager attention then gets no mask at all."""
    check(adapted("gemma2"), set_on_config("is_causal", False))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_decoder_made_bidirectional_by_a_keyword(name: str) -> None:
    check(adapted(name), nothing, before={}, is_causal=False)


def test_an_encoder_made_causal_by_its_modules() -> None:
    check(adapted("bert"), set_on("self", "is_causal", True))


def test_an_encoder_whose_attention_reads_another_sequence() -> None:
    model = adapted("bert")
    for layer in model.bert.encoder.layer:
        layer.attention.is_cross_attention = True
    theirs = results(copy.deepcopy(model), attention_mask=PADDING)
    assert "encoder layer" not in {name for name, _ in accelerate(model).swaps}
    assert are_close(results(model, attention_mask=PADDING), theirs)


def test_an_encoder_made_causal_by_a_keyword() -> None:
    check(adapted("bert"), nothing, before={}, is_causal=True)


def test_an_encoder_made_causal_by_its_config() -> None:
    check(adapted("bert"), set_on_config("is_decoder", True), attention_mask=PADDING)


@pytest.mark.parametrize(("name", "attention", "causal"), [("llama", "self_attn", False), ("bert", "self", True)])
def test_the_other_direction_before(name: str, attention: str, causal: bool) -> None:
    model = adapted(name)
    usual = results(model)
    set_on(attention, "is_causal", causal)(model)
    theirs = results(copy.deepcopy(model))
    assert not are_close(theirs, usual)
    accelerate(model)
    assert are_close(results(model), theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_of_t5_with_a_keyword(causal: bool) -> None:
    model = adapted("t5")
    theirs = results(copy.deepcopy(model))
    accelerate(model)
    set_on("SelfAttention", "is_causal", causal)(model)
    plain = adapted("t5")
    set_on("SelfAttention", "is_causal", causal)(plain)
    changed = results(plain)
    assert not are_close(changed, theirs)
    assert are_close(results(model), changed)


# ---- the attention implementation


def averaging(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """Attend to all tokens equally."""
    repeats = query.shape[1] // value.shape[1]
    y = value.mean(2, keepdim=True).expand_as(value).repeat_interleave(repeats, 1)
    return y.transpose(1, 2).contiguous() * (query.mean() + key.mean()).sigmoid(), None


@pytest.fixture
def custom() -> Iterator[str]:
    AttentionInterface.register("averaging", averaging)
    AttentionMaskInterface.register("averaging", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield "averaging"
    del AttentionInterface._global_mapping["averaging"]
    del AttentionMaskInterface._global_mapping["averaging"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_a_registered_attention_set_later(name: str, custom: str) -> None:
    check(adapted(name), lambda model: model.set_attn_implementation(custom))


def test_eager_attention_set_later_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    accelerate(model)
    called: list[int] = []
    softmax = nn.functional.softmax

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return softmax(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "softmax", counted)
    usual = results(model)
    assert not called
    model.set_attn_implementation("eager")
    assert are_close(results(model), usual)
    assert len(called) == 2
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)  # fused again
    assert are_close(results(model), usual)
    assert len(called) == 2


def test_an_attention_registered_under_the_name_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    plain = copy.deepcopy(model)
    usual = results(plain)
    accelerate(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", averaging)
    theirs = results(plain)
    assert not are_close(theirs, usual)
    assert are_close(results(model), theirs)


# ---- what a forward reads from its config


def family(name: str, **words: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**GROUPED, "pad_token_id": 0, **words})
    return with_adapter(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config))


CLIPPED: dict[str, dict[str, Any]] = {
    "Olmo": {},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", CLIPPED)
def test_projections_clipped_once_an_adapter_grew(name: str) -> None:
    """The clip has no effect in the probe."""

    def grow(model: Any) -> None:
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_B" in path:
                    parameter.mul_(40)

    usual, model = family(name, **CLIPPED[name]), family(name, clip_qkv=3.0, **CLIPPED[name])
    plain = copy.deepcopy(model)
    assert are_close(results(plain), results(usual))
    accelerate(model)
    for one in (model, plain, usual):
        grow(one)
    theirs = results(plain)
    assert not are_close(theirs, results(usual))
    assert are_close(results(model), theirs)


@pytest.mark.parametrize("name", CLIPPED)
def test_projections_clipped_later(name: str) -> None:
    check(family(name, **CLIPPED[name]), set_on_config("clip_qkv", 0.05))


def test_without_a_clip_it_is_accelerated() -> None:
    assert "2 × OlmoAttention: attention" in str(accelerate(family("Olmo")))


ROPE = {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 10}
MIXTURE = {"num_local_experts": 2, "n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
POSITION: dict[str, Callable[[float], dict[str, Any]]] = {
    "Ministral3": lambda beta: {"head_dim": 8, "rope_parameters": ROPE | {"llama_4_scaling_beta": beta}},
    "Mistral4": lambda beta: {
        **(MIXTURE | LATENT | {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1}),
        "rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": beta},
    },
    "Llama4Text": lambda beta: {
        **MIXTURE,
        "head_dim": 8,
        "floor_scale": 10,
        "attn_scale": beta,
        "no_rope_layers": [0, 0],
        "moe_layers": [],
        "intermediate_size_mlp": 48,
    },
}


@pytest.mark.parametrize("name", POSITION)
def test_queries_scaled_by_positions_longer_than_the_probe(name: str) -> None:
    model, unscaled = family(name, **POSITION[name](0.9)), family(name, **POSITION[name](0.0))
    theirs = results(copy.deepcopy(model))
    assert not are_close(theirs, results(unscaled))
    accelerate(model)
    assert are_close(results(model), theirs)


# ---- third-party forwards


PARTS = ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "act_fn", "q_norm"]
CLASSES = {
    "self_attn": modeling_qwen3.Qwen3Attention,
    "mlp": modeling_qwen3.Qwen3MLP,
    "input_layernorm": modeling_qwen3.Qwen3RMSNorm,
    "layer": modeling_qwen3.Qwen3DecoderLayer,
    "act_fn": transformers.activations.SiLUActivation,
    "linear": nn.Linear,
}


def test_a_forward_of_conv1d_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    check(adapted("gpt2"), lambda _: monkeypatch.setattr(Conv1D, "forward", replaced(Conv1D.forward)))


def changed(output: Any) -> Any:
    return (output[0] * 1.5 + 0.3, *output[1:]) if isinstance(output, tuple) else output * 1.5 + 0.3


def same(output: Any) -> Any:
    return output


def replaced(forward: Callable[..., Any]) -> Callable[..., Any]:
    def other(*args: Any, **kwargs: Any) -> Any:
        return changed(forward(*args, **kwargs))

    return other


@pytest.mark.parametrize("part", CLASSES)
def test_a_forward_replaced_on_the_class_later(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = adapted("qwen3"), CLASSES[part]
    plain = copy.deepcopy(model)
    usual = results(plain)
    assert accelerate(model).swaps
    assert are_close(results(model), usual)
    monkeypatch.setattr(kind, "forward", replaced(kind.forward))
    theirs = results(plain)
    assert not are_close(theirs, usual)
    assert are_close(results(model), theirs)
    monkeypatch.undo()
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)  # fused again
    assert are_close(results(model), usual)


def twice_in_training(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that no probe in eval mode distinguishes from the class's own."""

    def other(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return changed(output) if self.training else output

    return other


@pytest.mark.parametrize("part", CLASSES)
def test_a_forward_replaced_on_the_class_before(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = adapted("qwen3"), CLASSES[part]
    usual = results(model)
    monkeypatch.setattr(kind, "forward", twice_in_training(kind.forward))
    theirs = results(copy.deepcopy(model))
    assert not are_close(theirs, usual)
    accelerate(model)
    assert are_close(results(model), theirs)


@pytest.mark.parametrize("part", [*PARTS, "q_proj", "down_proj"])
def test_a_forward_replaced_on_an_instance_later(part: str) -> None:
    def change(model: Any) -> None:
        module = named(model, part)[-1]
        module.forward = replaced(module.forward)

    check(adapted("qwen3"), change)


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize("part", [*PARTS, "q_proj", "down_proj"])
def test_a_forward_replaced_on_an_instance_before(part: str) -> None:
    def patch(model: Any) -> None:
        module = named(model, part)[0]
        own = module.forward
        module.forward = lambda *args, **kwargs: (changed if module.training else same)(own(*args, **kwargs))

    model, plain = adapted("qwen3"), adapted("qwen3")
    usual = results(plain)
    patch(model)
    patch(plain)
    theirs = results(plain)
    assert not are_close(theirs, usual)
    accelerate(model)
    assert are_close(results(model), theirs)


@pytest.mark.parametrize("later", [True, False])
def test_a_function_that_kernelize_replaced_in_one_module(later: bool) -> None:
    """It sets `forward` of the wrapper that the module has for itself."""

    def change(model: Any) -> None:
        wrapper = named(model, "self_attn")[-1]._kernel_funcs["rotary_pos_emb"]
        wrapper.forward = types.MethodType(lambda _, q, k, cos, sin: (q * 1.5, k), wrapper)

    model = adapted("qwen3")
    if not hasattr(named(model, "self_attn")[0], "_kernel_funcs"):
        pytest.skip("transformers before 5.25, or without the package kernels")
    if later:
        check(model, change)
        return
    plain, usual = copy.deepcopy(model), results(copy.deepcopy(model))
    change(model)
    change(plain)
    theirs = results(plain)
    assert not are_close(theirs, usual)
    report = accelerate(model)
    assert any("kernelize" in one.why for one in report.skipped)
    assert are_close(results(model), theirs)


class OtherNorm(modeling_qwen3.Qwen3RMSNorm):  # type: ignore[misc]
    """A norm with the children and the name of a known one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1.5


class OtherAttention(modeling_qwen3.Qwen3Attention):  # type: ignore[misc]
    """An attention with the children of a known one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, weights = super().forward(*args, **kwargs)
        return y * 1.5, weights


@pytest.mark.parametrize(
    ("part", "make"),
    [
        ("self_attn", lambda config: OtherAttention(config, 0)),
        ("input_layernorm", lambda config: OtherNorm(config.hidden_size)),
        ("q_norm", lambda config: OtherNorm(config.head_dim)),
        ("act_fn", lambda _: nn.ReLU()),
    ],
)
def test_a_module_put_in_place_of_another_later(part: str, make: Callable[[Any], nn.Module]) -> None:
    def change(model: Any) -> None:
        old = named(model, part)[0]
        new = make(model.config)
        for parameter in new.parameters():
            parameter.requires_grad_(False)
        if isinstance(new, OtherAttention):
            new._modules.update(old._modules)
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new.train()

    torch.manual_seed(0)
    check(adapted("qwen3"), change)


# ---- hooks


def after(module: nn.Module, args: Any, output: Any) -> Any:
    return changed(output)


def ahead(module: nn.Module, args: Any, kwargs: Any) -> Any:
    if args:
        return (args[0] * 1.5 + 0.3, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.5 + 0.3}


def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if g is None else g * 1.5 for g in grad_input)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "after": lambda module: module.register_forward_hook(after),
    "before": lambda module: module.register_forward_pre_hook(ahead, with_kwargs=True),
    "backward": lambda module: module.register_full_backward_hook(backward),
    "before backward": lambda module: module.register_full_backward_pre_hook(
        lambda _, grads: tuple(None if g is None else g * 1.5 for g in grads)
    ),
}


SEEN = [*PARTS, "q_proj", "o_proj", "down_proj", "base_layer"]


@pytest.mark.costly(cases=8)
@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # attention is called with keyword arguments
@pytest.mark.parametrize(
    ("part", "hook"),
    [(part, hook) for part in SEEN for hook in HOOKS if (part, hook) != ("self_attn", "backward")],  # gets no gradient
)
def test_a_hook_added_later(part: str, hook: str) -> None:
    check(adapted("qwen3"), lambda model: HOOKS[hook](named(model, part)[-1]))


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_global_hooks_see_every_module(name: str) -> None:
    model = adapted(name)
    plain = copy.deepcopy(model)
    accelerate(model)
    seen: list[str] = []
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        results(plain)
        theirs = seen.copy()
        seen.clear()
        results(model)
    finally:
        handle.remove()
    assert sorted(seen) == sorted(theirs)
    assert len(theirs) > 20


# ---- keyword arguments


@pytest.mark.parametrize("value", [None, False, 0, 0.5])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_unknown_keyword_sends_the_call_back(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    theirs = results(copy.deepcopy(model))
    accelerate(model)
    called: list[int] = []
    own = nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    assert are_close(results(model), theirs)
    assert not called
    assert are_close(results(model, some_keyword=value), theirs)
    assert len(called) == 2


def test_known_keywords_that_say_nothing_leave_it_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    accelerate(model)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    results(model, output_attentions=False, cache=None, use_cache=False)


def test_a_layer_of_eager_attention_called_without_a_mask() -> None:
    """Eager attention without a mask sees all tokens."""
    model = adapted("gemma2")
    plain = copy.deepcopy(model)
    accelerate(model)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(6)[None]

    def layer(one: Any) -> Tensor:
        turns = one.model.rotary_emb(x, targets)
        y = one.model.layers[1](x, attention_mask=None, position_ids=targets, position_embeddings=turns)
        return y[0] if isinstance(y, tuple) else y

    torch.testing.assert_close(layer(model), layer(plain), rtol=1e-4, atol=1e-5)


def test_a_changed_model_uses_neither_the_last_layer_nor_the_head_alone() -> None:
    model = adapted("llama")
    head = accelerate(model, logits=False).head
    assert head is not None and head.last is not None
    labels = IDS.masked_fill(torch.arange(IDS.shape[1]) < 9, -100)
    assert head.last.keyword(labels, -100, {}) and head.applies()
    theirs = model(input_ids=IDS, labels=labels)
    assert theirs.logits is None
    model.set_attn_implementation("eager")
    assert not head.last.keyword(labels, -100, {}) and head.applies()
    torch.testing.assert_close(model(input_ids=IDS, labels=labels).loss, theirs.loss, rtol=1e-4, atol=1e-5)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not head.applies()
        ours = model(input_ids=IDS, labels=labels)
    finally:
        handle.remove()
    assert ours.logits is not None
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)


def test_copies_and_replicas_of_a_stand_in_are_plain() -> None:
    """A replica, as `DataParallel` creates it, has no contract, so it runs the module's own forward."""
    model = adapted("llama")
    theirs = results(model)
    accelerate(model)
    assert are_close(results(copy.deepcopy(model)), theirs)
    for layer in model.model.layers:
        replica = layer._replicate_for_data_parallel()
        assert type(replica) is type(layer)
        for name, module in model.model.layers._modules.items():
            if module is layer:
                model.model.layers._modules[name] = replica
    assert are_close(results(model), theirs)


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize("name", PACKING)
def test_a_packed_batch_that_is_handed_back_keeps_its_sequences_apart(name: str) -> None:
    """A hook on all modules sends every call to the model's own forwards."""
    model = adapted(name)
    acceleration = accelerate(model)
    assert acceleration.packs
    ids = torch.randint(0, 61, (2, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    packed, _ = pack_rows(ids, mask, ids)
    with torch.no_grad():
        fused = model(**packed).logits[0]
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            plain = model(**packed).logits[0]
        finally:
            handle.remove()
    torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-4)


# ---- what a forward calls, directly or through others


INNER: dict[str, tuple[str, Any, str]] = {
    "function": ("qwen3", modeling_qwen3, "apply_rotary_pos_emb"),
    "function of a function": ("qwen3", modeling_qwen3, "rotate_half"),
    "method": ("gemma2", modeling_gemma2.Gemma2RMSNorm, "_norm"),
    "attention function": ("qwen3", sdpa_attention, "repeat_kv"),
}


@pytest.mark.parametrize("what", INNER)
def test_what_a_forward_calls_replaced_later(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, holder, function = INNER[what]
    call = {"attention_mask": PADDING} if what == "attention function" else {}  # it runs only with a mask
    own = getattr(holder, function)
    check(adapted(name), lambda _: monkeypatch.setattr(holder, function, replaced(own)), **call)


@pytest.mark.parametrize("what", ["code", "defaults"])
def test_functions_changed_in_place_later(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(_: Any) -> None:
        if what == "defaults":
            rotary: Any = modeling_qwen3.apply_rotary_pos_emb
            if isinstance(rotary, nn.Module):  # transformers 5.25: a wrapper by the package kernels
                rotary = inspect.getclosurevars(type(rotary).forward).nonlocals["func"]
            monkeypatch.setattr(rotary, "__defaults__", (2,))
        else:
            monkeypatch.setattr(modeling_qwen3.rotate_half, "__code__", (lambda x: -x).__code__)

    model = adapted("qwen3")
    plain = copy.deepcopy(model)
    usual = results(plain)
    assert accelerate(model).swaps
    change(model)
    if what == "code":
        theirs = results(plain)
        assert not are_close(theirs, usual) and are_close(results(model), theirs)
    else:
        for one in (plain, model):  # positions along another dimension do not fit
            with pytest.raises(RuntimeError):
                results(one)


def test_a_loss_function_registered_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    plain = copy.deepcopy(model)
    accelerate(model, logits=False)
    usual = model(input_ids=IDS, labels=IDS)
    assert usual.logits is None
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", lambda logits, **_: logits.square().mean())
    ours, theirs = model(input_ids=IDS, labels=IDS), plain(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-6)
    assert ours.logits is not None and abs(float((ours.loss - usual.loss).detach())) > 1e-3
