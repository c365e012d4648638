"""Skipped rows in the last layer: the same loss and gradients from only the rows with loss, where this is exact."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lorakit import LoraConfig, core
from lorakit.identity.identities import Identities
from lorakit.speed import Acceleration, accelerate, last_layer, pack_rows
from lorakit.speed.acceleration import accelerate_known
from lorakit.speed.admission import Known
from lorakit.speed.attention import PreparedAttention

from ..doubles import InDouble
from .test_acceleration import MODELS, WHOLE_LAYERS, adapted, close, given

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls it
FEW = tuple(name for name in WHOLE_LAYERS if name != "mixtral")


@pytest.fixture
def rows_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """Count the rows that each attention of a decoder layer computes."""
    seen: list[int | None] = []
    run = PreparedAttention.run

    def listening(*args: Any, wanted: Tensor | None = None, **words: Any) -> Any:
        seen.append(None if wanted is None else len(wanted))
        return run(*args, wanted=wanted, **words)

    monkeypatch.setattr(PreparedAttention, "run", listening)
    yield seen


def batch(model: Any) -> tuple[Tensor, Tensor]:
    """Return tokens, and labels with 9 valid positions."""
    ids = given(model)["input_ids"]
    labels = ids.clone()
    labels[0, :7] = labels[1, 3:] = labels[2, :5] = labels[2, 8:] = -100
    return ids, labels


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_loop(model: Any, acceleration: Acceleration, labels: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients as in our own loop."""
    assert acceleration.head is not None
    model.zero_grad()
    loss = acceleration.head.loss_sum(model, labels, **inputs)
    loss.backward()
    return loss.detach(), gradients(model)


def of_model(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize("name", FEW)
def test_loss_and_gradients_of_the_loop(name: str, rows_seen: list[int | None]) -> None:
    model = adapted(name, torch.float64)
    ids, labels = batch(model)
    with InDouble():
        theirs = of_model(model, input_ids=ids, labels=labels, num_items_in_batch=1)
        acceleration = accelerate(model)
        assert acceleration.head is not None and acceleration.head.last is not None, str(acceleration)
        assert "only labeled rows" in str(acceleration)
        rows_seen.clear()
        close(of_loop(model, acceleration, labels, input_ids=ids), theirs, 1e-10)
    assert rows_seen == [None, 8]


@pytest.mark.parametrize("name", FEW)
def test_rows_end_to_end(name: str, rows_seen: list[int | None]) -> None:
    model = adapted(name, torch.float64)
    ids, labels = batch(model)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs, wanted = pack_rows(ids, mask, labels)
    with InDouble():
        acceleration = accelerate(model)
        assert acceleration.head is not None
        ours = of_loop(model, acceleration, wanted, **inputs)
        assert rows_seen[-1] == 8
        acceleration.head.last = None
        close(ours, of_loop(model, acceleration, wanted, **inputs), 1e-10)
    assert rows_seen[-1] is None


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("words", [{}, {"num_items_in_batch": 11}, {"shift": True, "ignore_index": -7}], ids=str)
def test_the_models_own_loss(inner: bool, words: dict[str, Any], rows_seen: list[int | None]) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    outer = peft.get_peft_model(MODELS["llama"]().double(), config).train()
    model = outer.get_base_model() if inner else outer
    ids, labels = batch(outer)
    inputs = {"input_ids": ids, "labels": labels, **words}
    if inputs.pop("shift", False):
        inputs["shift_labels"] = labels.roll(-1, 1).masked_fill(labels.roll(-1, 1) == -100, -7)
    with InDouble():
        theirs = of_model(model, **inputs)
        accelerate(outer, logits=False)
        rows_seen.clear()
        close(of_model(model, **inputs), theirs, 1e-10)
    assert rows_seen == [None, 9 if "shift_labels" in inputs else 8]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2_dropping"])
def test_both_checkpoint_modes(name: str, reentrant: bool, rows_seen: list[int | None]) -> None:
    """With dropout, too: a recomputed layer uses the same rows and dropout."""
    model = adapted(name, lora_dropout=0.2)
    ids, labels = batch(model)
    acceleration = accelerate(model)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    wanted = of_loop(model, acceleration, labels, input_ids=ids)
    words: dict[str, Any] = {"use_reentrant": reentrant}
    if not reentrant:
        words["context_fn"] = core.checkpoint_contexts(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(words)
    rows_seen.clear()
    torch.manual_seed(3)
    close(of_loop(model, acceleration, labels, input_ids=ids), wanted, 1e-6)
    assert rows_seen == [None, 8, 8, None]


@pytest.mark.costly
@pytest.mark.parametrize("name", ["llama", "gpt2_dropping"])
def test_dropout_has_the_same_law(name: str, rows_seen: list[int | None]) -> None:
    model = adapted(name, lora_dropout=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that dropout affects the loss
    ids, labels = batch(model)
    acceleration = accelerate(model)
    head: Any = acceleration.head

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.stack([head.loss_sum(model, labels, input_ids=ids) for _ in range(200)]).double()

    torch.manual_seed(5)
    ours, seen = losses(), rows_seen[-1]
    head.last = None
    theirs = losses()
    assert (seen, rows_seen[-1]) == (8, None)
    assert abs(ours.mean() - theirs.mean()) < 4.5 * ((ours.var() + theirs.var()) / 200) ** 0.5
    assert 0.7 < ours.std() / theirs.std() < 1.4


def test_where_most_or_no_tokens_are_trained_all_rows_go(rows_seen: list[int | None]) -> None:
    model = adapted("llama")
    ids, _ = batch(model)
    acceleration = accelerate(model)
    rows_seen.clear()
    of_loop(model, acceleration, ids, input_ids=ids)
    of_loop(model, acceleration, torch.full_like(ids, -100), input_ids=ids)
    assert rows_seen == [None] * 4
    assert last_layer.SHARE == 0.9


def test_what_shows_the_layer_to_others_takes_all_rows(rows_seen: list[int | None]) -> None:
    model = adapted("llama")
    ids, labels = batch(model)
    inputs = {"input_ids": ids, "labels": labels, "use_cache": False}
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    model = adapted("llama")  # requesting it leaves hooks on the model
    accelerate(model, logits=False)
    last = model.model.layers[-1]
    for module in (last.mlp, last.mlp.up_proj.base_layer, last.self_attn, last, model.model.norm, model.model):
        seen: list[Any] = []
        hook = module.register_forward_hook(lambda *given, seen=seen: seen.append(given[-1]))
        of_model(model, input_ids=ids, labels=labels)
        hook.remove()
        assert rows_seen[-1] is None
    torch.testing.assert_close(seen[0].last_hidden_state, hidden[-1], rtol=1e-4, atol=1e-5)
    of_model(model, input_ids=ids, labels=labels)
    assert rows_seen[-1] == 8
    rows_seen.clear()
    shown = model(**inputs, output_hidden_states=True)
    assert not any(rows_seen) and shown.logits is None
    for one, other in zip(shown.hidden_states, hidden, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    model(**inputs, logits_to_keep=0)
    assert model.eval()(**inputs).logits is not None and not any(rows_seen[-2:])


def test_only_the_thread_of_the_call_is_concerned(rows_seen: list[int | None]) -> None:
    model = adapted("llama")
    ids, labels = batch(model)
    acceleration = accelerate(model)
    assert acceleration.head is not None
    wanted = model(input_ids=ids).logits
    found: list[Tensor] = []
    threads: list[threading.Thread] = []

    def other(*_: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=lambda: found.append(model(input_ids=ids).logits)))
            threads[0].start()
            threads[0].join()

    hook = model.model.layers[0].mlp.register_forward_hook(other)
    acceleration.head.loss_sum(model, labels, input_ids=ids)
    hook.remove()
    torch.testing.assert_close(found[0], wanted)
    assert rows_seen[-1] == 8


@pytest.mark.costly(cases=0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["layers", "model", "around"])
def test_what_a_compiler_runs_gets_no_rows(part: str, rows_seen: list[int | None]) -> None:
    torch._dynamo.reset()
    model = adapted("llama")
    ids, labels = batch(model)
    theirs = of_model(model, input_ids=ids, labels=labels)
    accelerate(model, logits=False)
    words: dict[str, Any] = {"fullgraph": True, "backend": "eager"}
    if part == "around":
        model.model = torch.compile(model.model, **words)
    for module in {"layers": model.model.layers, "model": [model.model], "around": []}[part]:
        module.compile(**words)
    rows_seen.clear()
    loss, found = of_model(model, input_ids=ids, labels=labels)
    close((loss, {name.replace("_orig_mod.", ""): gradient for name, gradient in found.items()}), theirs, 2e-5)
    assert set(rows_seen) <= {None}
    torch._dynamo.reset()


def of_class(kind: type[Any]) -> Any:
    """A small adapted Llama of a user-defined class."""
    torch.manual_seed(0)
    model = kind(MODELS["llama"]().config)
    model.config.use_cache = False
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    return model.train()


class MixedBehind(transformers.LlamaForCausalLM):
    """The head sees means over earlier positions."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        hidden = hidden.cumsum(1) / torch.arange(1, 1 + hidden.shape[1])[:, None]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class HeadOnTheSide(transformers.LlamaForCausalLM):
    """Another output is computed from the same hidden states."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        out = transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)
        out.value = hidden.mean(-1)
        return out


class LossOnTheSide(transformers.LlamaForCausalLM):
    """Another loss reads the same hidden states."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss + hidden.std()
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class KeepsWordsToItself(transformers.LlamaForCausalLM):
    """Unknown arguments are not passed to its layers."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False) -> Any:
        return super().forward(input_ids, labels=labels, use_cache=use_cache)


class Twice(transformers.LlamaForCausalLM):
    """The layers run twice."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList([*self.model.layers, *self.model.layers])
        config.num_hidden_layers = 4


@pytest.mark.parametrize("kind", [MixedBehind, HeadOnTheSide, LossOnTheSide, KeepsWordsToItself, Twice])
def test_models_whose_head_reads_something_else_take_all_rows(kind: type[Any], rows_seen: list[int | None]) -> None:
    model = of_class(kind)
    ids, labels = batch(model)
    theirs = of_model(model, input_ids=ids, labels=labels)
    known = accelerate(model, logits=False)
    assert (known.head is not None) == (kind is Twice)  # the others have source of their own
    close(of_model(model, input_ids=ids, labels=labels), theirs, 1e-4)
    known.undo()
    acceleration = accelerate_known(model, Known(Identities(), None), logits=False, keep_feed_forward=True)
    head, loss = acceleration.head, acceleration.loss
    assert head is not None and loss is not None and loss.last is None
    assert (head.last is None) == (kind is not LossOnTheSide)  # which our loop does not request
    rows_seen.clear()
    close(of_model(model, input_ids=ids, labels=labels), theirs, 1e-4)
    assert set(rows_seen) == {None}


def test_a_mixture_takes_all_rows(rows_seen: list[int | None]) -> None:
    """Its router's loss counts every token."""
    model = adapted("mixtral")
    ids, labels = batch(model)
    theirs = of_model(model, input_ids=ids, labels=labels, output_router_logits=True)
    accelerate(model, logits=False)
    close(of_model(model, input_ids=ids, labels=labels, output_router_logits=True), theirs, 2e-5)
    close(
        of_model(model, input_ids=ids, labels=labels), of_model(adapted("mixtral"), input_ids=ids, labels=labels), 2e-5
    )


def test_less_is_kept_for_the_backward() -> None:
    model = adapted("llama")
    ids, labels = batch(model)
    acceleration = accelerate(model)
    head: Any = acceleration.head

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            head.loss_sum(model, labels, input_ids=ids)
        return sum(sizes)

    few, head.last = kept(), None
    of_layer = (
        32 + 32 + 2 * 48 + 1 + 4 * 4
    )  # heads' output, x, gate and up, its norm's statistic; h of o, gate, up, down
    scatter_rows = 8 + 8 * 32  # the row indices, and their outputs
    assert kept() - few == (ids.numel() - 8) * of_layer - scatter_rows
