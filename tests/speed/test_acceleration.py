"""`accelerate`: equal results from fused forwards, which modules are replaced, and exact restoration."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorakit import LoraConfig, core
from lorakit.errors import ModelError
from lorakit.speed import Acceleration, accelerate, acceleration, pack_rows
from lorakit.speed.patching import is_replacement

from ..laws.snapshots import bits, snapshot
from ..small_models import bert, gemma2, gpt2, llama, mistral, mixtral, neox, olmo2, opt, phi3, qwen2, qwen3, t5


def gpt2_dropping() -> Any:
    return gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)


def phi3_dropping() -> Any:
    return phi3(resid_pdrop=0.2, embd_pdrop=0.2, attention_dropout=0.2)


def opt_dropping() -> Any:
    return opt(dropout=0.1, attention_dropout=0.3)


MODELS: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (llama, mistral, qwen2, qwen3, gemma2, olmo2, gpt2, phi3, mixtral, opt, neox, bert, t5)
}
WHOLE_LAYERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "gpt2", "phi3", "mixtral", "neox", "opt")
PACKING = tuple(name for name in WHOLE_LAYERS if name != "opt")  # OPT itself does not keep packed sequences apart
DROPPING = ("gpt2_dropping", "phi3_dropping", "opt_dropping")


def adapted(name: str, dtype: torch.dtype = torch.float32, **words: Any) -> Any:
    """Return a model with one adapter whose B is not zero, in training mode."""
    torch.manual_seed(0)
    model = (MODELS.get(name) or globals()[name])().to(dtype)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # fused forwards do not support a forward that fills a cache
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **words), seed=1)
    return model.train()


def given(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (3, 10), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of one batch."""
    model.zero_grad()
    loss = model(**given(model)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], bound: float) -> None:
    assert ours[1].keys() == theirs[1].keys()
    assert float((ours[0] - theirs[0]).abs()) <= bound * float(theirs[0].abs())
    for name, gradient in theirs[1].items():
        assert float((ours[1][name] - gradient).norm()) <= bound * float(gradient.norm()) + 1e-9, name


def recipes(acceleration: Acceleration) -> set[str]:
    return {recipe for recipe, _ in acceleration.swaps}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    theirs = step(model)
    acceleration = accelerate(model)
    if "attention" in recipes(acceleration):  # the step then runs no attention of the model's own
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    close(step(model), theirs, 2e-5)
    assert ("decoder layer" in recipes(acceleration)) == (name in WHOLE_LAYERS), str(acceleration)
    assert acceleration.packs == (name in PACKING), str(acceleration)


def test_rows_of_an_attention_that_drops_lie_end_to_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention dropout is applied within each sequence; no map of all tokens × all tokens is created."""
    model = adapted("gpt2_dropping")
    acceleration = accelerate(model)
    assert acceleration.packs and acceleration.head is not None
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    ids = given(model)["input_ids"]
    inputs, labels = pack_rows(ids, torch.ones_like(ids), ids)
    losses = torch.stack(
        [acceleration.head.loss_sum(model, labels, **inputs, use_cache=False).detach() / 27 for _ in range(40)]
    )
    apart = torch.stack([model(**given(model)).loss.detach() for _ in range(40)])
    assert abs(losses.mean() - apart.mean()) < 5 * ((losses.var() + apart.var()) / 40) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_it_is_undone_to_the_module(name: str) -> None:
    model = adapted(name)
    before, modules, keys = snapshot(model), dict(model.named_modules()), list(model.state_dict())
    theirs = step(model)
    acceleration = accelerate(model)
    assert list(model.state_dict()) == keys
    step(model)
    acceleration.undo()
    assert all(module is modules[path] for path, module in model.named_modules())
    assert snapshot(model) == before
    again = step(model)
    assert bits(again[0]) == bits(theirs[0])
    assert all(bits(again[1][key]) == bits(gradient) for key, gradient in theirs[1].items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_in_bf16_it_is_as_near_to_the_truth_as_the_model_itself(name: str) -> None:
    exact, model = adapted(name, torch.float64), adapted(name, torch.bfloat16)
    with torch.no_grad():
        for (_, wide), narrow in zip(exact.named_parameters(), model.parameters(), strict=True):
            wide.copy_(narrow)
    truth, theirs = step(exact), step(model)
    accelerate(model)
    ours = step(model)

    def error(found: tuple[Tensor, dict[str, Tensor]]) -> float:
        return sum(float((found[1][k].double() - g).norm() / g.norm()) for k, g in truth[1].items()) / len(truth[1])

    assert error(ours) <= 1.4 * error(theirs)  # a single linear rounds A, B and A·x to bf16; the model does not
    assert abs(float(ours[0]) - float(truth[0])) <= 1.5 * abs(float(theirs[0]) - float(truth[0])) + 2e-3


@pytest.mark.costly
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_of_the_base_has_the_same_law(name: str) -> None:
    """Mean and spread of the loss over draws, with and without dropout of the adapters; in eval mode nothing is drawn."""
    model = adapted(name, lora_dropout=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that dropout affects the loss

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.stack([model(**given(model)).loss for _ in range(200)]).double()

    torch.manual_seed(5)
    theirs = losses()
    quiet = model.eval()(**given(model)).loss
    acceleration = accelerate(model.train())
    ours = losses()
    torch.testing.assert_close(model.eval()(**given(model)).loss, quiet, rtol=1e-5, atol=1e-5)
    error = (theirs.var() / 200 + ours.var() / 200) ** 0.5
    assert abs(ours.mean() - theirs.mean()) < 4.5 * error, (ours.mean(), theirs.mean(), quiet)
    assert abs(theirs.mean() - quiet) > 6 * error  # dropout has an effect
    assert 0.7 < ours.std() / theirs.std() < 1.4
    assert recipes(acceleration) >= {"attention"}


def test_no_dropout_of_the_base_decides_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("gpt2_dropping", lora_dropout=0.1)
    acceleration = accelerate(model)
    assert "2 × GPT2Block: decoder layer" in str(acceleration)
    assert "Dropout: dropout" in str(acceleration)
    assert not any("lora_dropout" in path for path, module in model.named_modules() if is_replacement(module))

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a module's own dropout ran")

    monkeypatch.setattr(torch.nn.functional, "dropout", refuse)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    step(model)


def test_dropout_is_drawn_from_torchs_generator_and_undone() -> None:
    model = adapted("gpt2_dropping")
    before = snapshot(model)
    torch.manual_seed(1)
    theirs = step(model)
    acceleration = accelerate(model)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(step(model))
    close(found[1], found[0], 0.0)
    assert bits(found[2][0]) != bits(found[0][0])
    acceleration.undo()
    assert snapshot(model) == before
    torch.manual_seed(1)
    assert bits(step(model)[0]) == bits(theirs[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_is_the_same_in_a_recomputation(reentrant: bool) -> None:
    model = adapted("gpt2_dropping", lora_dropout=0.1)
    accelerate(model)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    wanted = step(model)
    words: dict[str, Any] = {"use_reentrant": reentrant}
    if not reentrant:
        words["context_fn"] = core.checkpoint_contexts(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(words)
    torch.manual_seed(3)
    close(step(model), wanted, 1e-6)


def test_a_dropout_with_a_hook_is_called() -> None:
    model = adapted("gpt2_dropping")
    accelerate(model)
    seen: list[str] = []
    for child, said in (
        (model.transformer.h[0].attn.resid_dropout, "attn"),
        (model.transformer.h[1].mlp.dropout, "mlp"),
    ):
        child.register_forward_hook(lambda *_, said=said: seen.append(said))
    step(model)
    assert seen == ["attn", "mlp"]


def test_which_adapter_acts_is_asked_at_every_forward() -> None:
    model = adapted("llama").eval()
    core.attach(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), "b", seed=3)
    ids = given(model)["input_ids"]

    def answers() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for block in (core.use(model, "default"), core.use(model, "b"), core.use(model, "default", "b")):
                with block:
                    found.append(model(input_ids=ids).logits)
            with core.disable(model):
                found.append(model(input_ids=ids).logits)
            with core.route(model, ["b", None, "default"]):
                found.append(model(input_ids=ids).logits)
            core.merge(model, "b")
            with core.use(model, "b"):
                found.append(model(input_ids=ids).logits)
            core.unmerge(model)
        return found

    theirs = answers()
    acceleration = accelerate(model)
    assert "decoder layer" in recipes(acceleration)
    for ours, wanted in zip(answers(), theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    core.detach(model, "b")
    torch.testing.assert_close(model(input_ids=ids).logits, theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "b"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_has_its_forwards_adapter(reentrant: bool, name: str) -> None:
    model = adapted("llama")
    core.attach(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "b", seed=3)
    with core.use(model, name):
        theirs = step(model)
    accelerate(model)
    model.enable_input_require_grads()
    words: dict[str, Any] = {"use_reentrant": reentrant}
    if not reentrant:
        words["context_fn"] = core.checkpoint_contexts(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(words)
    model.zero_grad()
    with core.use(model, name):
        loss = model(**given(model), use_cache=False).loss
    loss.backward()  # after the block
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    close((loss.detach(), found), theirs, 2e-5)


@pytest.mark.parametrize("name", PACKING)
def test_rows_end_to_end_are_the_rows_alone(name: str) -> None:
    model = adapted(name)
    acceleration = accelerate(model)
    ids = given(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 6:] = mask[2, 3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    inputs, wanted = pack_rows(ids, mask, labels)
    assert inputs["input_ids"].shape == (1, int(mask.sum()))

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    assert acceleration.head is not None
    packed = acceleration.head.loss_sum(model, wanted, **inputs, use_cache=False)
    ours = (packed.detach(), gradients(packed))
    acceleration.undo()
    total = torch.zeros(())
    for row, length in zip(ids, mask.sum(1).tolist(), strict=True):
        one = row[None, :length]
        total = total + model(input_ids=one, labels=one, use_cache=False).loss * (length - 1)
    close(ours, (total.detach(), gradients(total)), 2e-5)


def test_a_window_holds_in_packed_rows() -> None:
    model = adapted("mistral")
    assert model.config.sliding_window == 4 < int(given(model)["input_ids"].shape[1])
    test_rows_end_to_end_are_the_rows_alone("mistral")


def test_calls_that_a_recipe_does_not_know_run_as_they_did() -> None:
    model = adapted("llama").eval()
    ids = given(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits
        cached = model(input_ids=ids[:, :6], use_cache=True)
        further = model(input_ids=ids[:, 6:], past_key_values=cached.cache).logits
        written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, padded, rtol=1e-4, atol=1e-5)
        cached = model(input_ids=ids[:, :6], use_cache=True)
        again = model(input_ids=ids[:, 6:], past_key_values=cached.cache).logits
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), written)
    torch.testing.assert_close(again, further, rtol=1e-4, atol=1e-5)


def test_a_hook_inside_is_still_called() -> None:
    model = adapted("llama")
    accelerate(model)
    seen: list[str] = []
    hooks = [
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("q")),
        model.model.layers[1].mlp.up_proj.base_layer.register_forward_hook(lambda *_: seen.append("up")),
        model.model.layers[1].mlp.up_proj.lora_A["default"].register_forward_hook(lambda *_: seen.append("A")),
    ]
    step(model)
    assert seen == ["q", "up", "A"]
    for hook in hooks:
        hook.remove()


def test_copies_and_pickles_are_plain_models() -> None:
    model = adapted("llama").eval()
    ids = given(model)["input_ids"]
    wanted = model(input_ids=ids).logits
    accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.model.layers[0]) is transformers.models.llama.modeling_llama.LlamaDecoderLayer
        torch.testing.assert_close(twin(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_trained_norm_keeps_its_gradient() -> None:
    model = adapted("llama")
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    theirs = step(model)
    acceleration = accelerate(model)
    ours = step(model)
    assert "model.norm.weight" in ours[1]
    close(ours, theirs, 2e-5)
    assert sum(recipe == "decoder layer" for recipe, _ in acceleration.swaps) == 1


def test_a_model_that_takes_no_tokens_is_left_and_said() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    acceleration = accelerate(model)
    assert not acceleration.swaps
    assert "does not run on token ids alone" in str(acceleration)


def test_the_report_says_what_got_what() -> None:
    said = str(accelerate(adapted("mixtral")))
    assert "2 × MixtralDecoderLayer: decoder layer" in said
    assert "2 × MixtralSparseMoeBlock: unchanged" in said or "MixtralSparseMoeBlock" not in said
    assert "1 × Linear: loss without logits" in said
    assert "loss: from logits" in str(accelerate(adapted("t5")))


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_heads_soft_cap_is_honoured(cap: float | None) -> None:
    torch.manual_seed(0)
    model = gemma2(final_logit_softcapping=cap)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # logits affected by the cap
    core.attach(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), seed=1)
    theirs = step(model.train())
    acceleration = accelerate(model)
    assert acceleration.head is not None and acceleration.head.softcap == cap
    batch = given(model)
    model.zero_grad()
    loss = acceleration.head.loss_sum(model, batch["labels"], input_ids=batch["input_ids"]) / 27
    loss.backward()
    ours = (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    close(ours, theirs, 5e-5)


def test_a_second_time_is_refused_and_changes_nothing() -> None:
    model = adapted("llama")
    modules, acceleration = dict(model.named_modules()), accelerate(model)
    with pytest.raises(ModelError, match=r"undo\(\)") as refused:
        accelerate(model)
    assert refused.value.what == "LlamaForCausalLM"
    acceleration.undo()
    assert all(module is modules[path] for path, module in model.named_modules())
    accelerate(model).undo()


def test_boundaries_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device each read would synchronize; and what changes is read again."""
    from lorakit.speed.attention import lengths_of

    boundaries, read = torch.tensor([0, 3, 7], dtype=torch.int32), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (read.append(1), tolist(tensor))[1])
    assert [lengths_of(boundaries) for _ in range(3)] == [(3, 4)] * 3
    assert len(read) == 1
    boundaries[1] = 2
    assert [lengths_of(boundaries) for _ in range(3)] == [(2, 5)] * 3
    assert len(read) == 2
    assert lengths_of(None) is None


def test_the_model_is_restored_once_and_not_for_each_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the time would grow with the square of layers times adapters."""
    model: Any = llama(num_hidden_layers=6).train()
    for number in range(4):
        core.attach(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), f"a{number}")
    walked, eval_mode = list[torch.nn.Module](), acceleration.eval_mode
    monkeypatch.setattr(acceleration, "eval_mode", lambda one: walked.append(one) or eval_mode(one))
    assert len(accelerate(model).swaps) > 12
    assert walked == [model, model]  # the plain model, and the one with all replacements
