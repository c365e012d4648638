"""Each fused forward: models of every supported structure, with padding and dropout, compared with their own forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorakit import LoraConfig, core
from lorakit.ops.attention_pattern import Pattern
from lorakit.speed import Acceleration, accelerate
from lorakit.speed.attention import under

from .. import small_models
from ..doubles import InDouble
from ..laws.snapshots import snapshot
from ..small_models import ENCODER, bert, gpt2, llama, neox, opt, t5


def roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER, pad_token_id=0))


def electra() -> Any:
    return transformers.ElectraForMaskedLM(transformers.ElectraConfig(**ENCODER, embedding_size=32))


def distilbert(**words: Any) -> Any:
    sizes = {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    none = {"dropout": 0.0, "attention_dropout": 0.0}
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes, **(none | words)))


def mistral() -> Any:
    return small_models.mistral(sliding_window=6)


def phi3() -> Any:
    return small_models.phi3(num_key_value_heads=4)


def neox_in_turn() -> Any:
    return neox(use_parallel_residual=False)


def neox_turned_whole() -> Any:
    return neox(rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0})


def flan_t5() -> Any:
    return t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def adapted(make: Callable[[], Any], dtype: torch.dtype = torch.float64, **words: Any) -> Any:
    """Return a model with one adapter whose B is not zero, in training mode."""
    torch.manual_seed(0)
    model = make().to(dtype)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **words), seed=1)
    return model.train()


def batch(padded: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (3, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded == "right":
        mask[0, 7:] = mask[2, 5:] = 0
    elif padded == "left":
        mask[0, :3] = mask[2, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return loss, logits at every position, and the gradients of one batch."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return [
        output.loss.detach(),
        output.logits.detach(),
        *(p.grad.clone() for p in model.parameters() if p.grad is not None),
    ]


def compared(model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, attended: int = 0) -> Acceleration:
    """Compare one step of a float64 model, accelerated, with its own, counting PyTorch's attention calls."""
    stock, called = torch.nn.functional.scaled_dot_product_attention, []
    before, modules = snapshot(model), dict(model.named_modules())
    with InDouble():
        theirs = step(model, inputs)
        acceleration = accelerate(model)
        with monkeypatch.context() as patched:
            patched.setattr(
                torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or stock(*a, **k)
            )
            ours = step(model, inputs)
    assert len(called) == attended
    assert len(ours) == len(theirs) > 10
    for found, wanted in zip(ours, theirs, strict=True):
        assert float((found - wanted).norm()) <= 1e-10 * float(wanted.norm()) + 1e-15
    acceleration.undo()
    assert snapshot(model) == before
    assert all(module is modules[path] for path, module in model.named_modules())
    return acceleration


@pytest.mark.parametrize("make", [bert, roberta, electra, distilbert])
@pytest.mark.parametrize("padded", ["no", "right", "left"])
def test_encoder_layers(make: Callable[[], Any], padded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    acceleration = compared(adapted(make), batch(padded), monkeypatch)
    assert [recipe for recipe, _ in acceleration.swaps].count("encoder layer") == 2, str(acceleration)
    assert "unchanged" not in str(acceleration)


@pytest.mark.parametrize("make", [llama, gpt2, mistral, phi3, opt, neox, neox_in_turn, neox_turned_whole])
@pytest.mark.parametrize("padded", ["no", "right"])
def test_decoder_layers(make: Callable[[], Any], padded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding after causal attention is hidden as before."""
    acceleration = compared(adapted(make), batch(padded), monkeypatch)
    assert [recipe for recipe, _ in acceleration.swaps].count("decoder layer") == 2, str(acceleration)


@pytest.mark.parametrize("make", [t5, flan_t5])
@pytest.mark.parametrize("padded", ["no", "right", "left"])
def test_sublayers(make: Callable[[], Any], padded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder and decoder, with padding on both sides; cross-attention is the model's own."""
    inputs: dict[str, Any] = {**batch(padded), "use_cache": False}
    acceleration = compared(adapted(make), inputs, monkeypatch, attended=2)
    said = str(acceleration)
    for kind in ("4 × T5LayerSelfAttention: sublayer", "4 × T5LayerFF: sublayer", "12 × T5LayerNorm: norm"):
        assert kind in said, said
    assert "2 × T5Attention: unchanged" in said


def test_a_sublayer_whose_distances_are_trained_runs_itself() -> None:
    model = adapted(t5, torch.float32)
    numbers = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(True)
    theirs = step(model, batch())
    accelerate(model)
    for ours, wanted in zip(step(model, batch()), theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert numbers.grad is not None and numbers.grad.abs().sum() > 0


def test_what_comes_beside_the_output_has_to_agree_too() -> None:
    """UMT5's self-attention has T5's children but returns other values."""
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.UMT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    model = adapted(lambda: transformers.UMT5ForConditionalGeneration(config), torch.float32)
    theirs = step(model, batch())
    said = str(accelerate(model))
    assert "4 × UMT5LayerFF: sublayer" in said and "UMT5LayerSelfAttention: sublayer" not in said
    for ours, wanted in zip(step(model, batch()), theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def bert_dropping() -> Any:
    return bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)


def distilbert_dropping() -> Any:
    return distilbert(dropout=0.2, attention_dropout=0.2)


def neox_dropping() -> Any:
    return neox(hidden_dropout=0.2, attention_dropout=0.2)


def opt_dropping() -> Any:
    return opt(dropout=0.2, attention_dropout=0.2)


def t5_dropping() -> Any:
    return t5(dropout_rate=0.2)


def flan_t5_dropping() -> Any:
    return t5(dropout_rate=0.2, feed_forward_proj="gated-gelu")


DRAWS = 100
WITH_DROPOUT = [bert_dropping, distilbert_dropping, neox_dropping, opt_dropping, t5_dropping, flan_t5_dropping]


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("make", WITH_DROPOUT)
def test_dropout_has_the_same_law(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and spread of the loss over draws, and no draw in eval mode; PyTorch's own dropout does not run."""
    model = adapted(make, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that dropout affects the loss
    inputs = batch()

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.stack([model(**inputs).loss for _ in range(DRAWS)]).double()

    torch.manual_seed(5)
    theirs = losses()
    quiet = model.eval()(**inputs).loss
    accelerate(model.train())
    own = "t5" in make.__name__ or make is opt_dropping  # cross-attention; OPT's embedding
    for name in () if own else ("dropout", "scaled_dot_product_attention"):
        monkeypatch.setattr(torch.nn.functional, name, None)
    ours = losses()
    torch.testing.assert_close(model.eval()(**inputs).loss, quiet, rtol=1e-5, atol=1e-5)
    error = ((theirs.var() + ours.var()) / DRAWS) ** 0.5
    assert abs(ours.mean() - theirs.mean()) < 4.5 * error, (ours.mean(), theirs.mean(), quiet)
    assert 0.7 < ours.std() / theirs.std() < 1.4
    assert ours.std() > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_encoders_dropout_is_the_same_in_a_recomputation(reentrant: bool) -> None:
    model = adapted(bert_dropping, torch.float32, lora_dropout=0.1)
    accelerate(model)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    wanted = step(model, batch())
    words: dict[str, Any] = {"use_reentrant": reentrant}
    if not reentrant:
        words["context_fn"] = core.checkpoint_contexts(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(words)
    torch.manual_seed(3)
    for found, expected in zip(step(model, batch()), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_an_encoder_layer_that_is_watched_or_asked_for_more_runs_itself() -> None:
    model = adapted(bert, torch.float32)
    accelerate(model)
    seen: list[str] = []
    inside = model.bert.encoder.layer[0].attention.self
    handle = inside.register_forward_hook(lambda *_: seen.append("attention"))
    step(model, batch())
    assert seen == ["attention"]
    handle.remove()
    outputs = model.eval()(**batch(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    model.bert.encoder.layer[1].output.LayerNorm.weight.requires_grad_(True)
    step(model.train(), batch())
    assert model.bert.encoder.layer[1].output.LayerNorm.weight.grad is not None


def test_a_model_says_why_an_encoder_layer_is_left() -> None:
    model = adapted(lambda: bert(is_decoder=True), torch.float32)
    assert "2 × BertLayer: unchanged (its attention is causal)" in str(accelerate(model))
    model = adapted(lambda: bert(attn_implementation="eager"), torch.float32)
    assert "2 × BertLayer: unchanged (attention implementation 'eager' is not supported)" in str(accelerate(model))


def test_a_mask_that_hides_all_from_a_token_or_shows_what_comes_is_the_models_own() -> None:
    for make, padded in ((llama, "left"), (mistral, "right")):
        model, inputs = adapted(make, torch.float32), batch(padded)
        if make is mistral:
            inputs["attention_mask"][0, 2:] = 0  # followed by tokens whose window is empty
        theirs = step(model, inputs)
        accelerate(model)
        for ours, wanted in zip(step(model, inputs), theirs, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    shown = torch.ones(3, 1, 10, 10, dtype=torch.bool)
    model = adapted(llama, torch.float32)
    inputs = {**batch("no"), "attention_mask": shown}
    theirs = step(model, inputs)
    accelerate(model)
    torch.testing.assert_close(step(model, inputs)[1], theirs[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_under_autocast_gives_what_it_gave(dtype: torch.dtype) -> None:
    model = adapted(bert, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = model(**batch())
        accelerate(model)
        ours = model(**batch())
    assert ours.logits.dtype == theirs.logits.dtype
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("make", [llama, bert, neox, t5])
def test_a_forward_that_asked_for_more_leaves_nothing_behind(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers then adds permanent hooks to layers and attentions; they collect outputs only on request."""
    model, inputs = adapted(make, torch.float32), {**batch(), "use_cache": False}
    inputs = {name: value for name, value in inputs.items() if make is not bert or name != "use_cache"}
    theirs = model(**inputs, output_hidden_states=True)
    assert any("capturing" in hook.__module__ for part in model.modules() for hook in part._forward_hooks.values())
    accelerate(model)
    ours = model(**inputs, output_hidden_states=True)
    name = "encoder_hidden_states" if make is t5 else "hidden_states"
    assert len(ours[name]) == 3
    for found, wanted in zip(ours[name], theirs[name], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if make is not t5:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    model(**inputs).loss.backward()


def test_attentions_that_are_asked_for_are_given() -> None:
    for make in (llama, bert, t5):
        model = adapted(make, torch.float32).eval()
        name = "encoder_attentions" if make is t5 else "attentions"
        model.set_attn_implementation("eager")
        wanted = model(**batch(), output_attentions=True)[name]
        model.set_attn_implementation("sdpa")
        accelerate(model)
        model.set_attn_implementation("eager")
        found = model(**batch(), output_attentions=True)[name]
        assert len(found) == len(wanted) == 2
        (model.encoder if make is t5 else model).config.output_attentions = True  # T5's sublayers have separate hooks
        assert len(model(**batch())[name]) == 2


def test_padding_on_another_device_is_the_models_own() -> None:
    """No kernel there supports a bias."""
    x, pattern = torch.empty(3, 10, 4, device="meta"), Pattern(causal=False)
    mask = batch()["attention_mask"].bool()[:, None, None].expand(-1, 1, 10, -1)
    assert under(mask, x, pattern) is None
    assert under(None, x, pattern) is pattern
    assert under(None, x, Pattern(bias=torch.zeros(1, 4, 10, 10))) is None
    found = under(mask, torch.empty(3, 10, 4), pattern)
    assert found is not None and found.bias is not None and found.bias.shape == (3, 1, 1, 10)
