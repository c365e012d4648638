"""Threads share an accelerated model: a call of a layer uses one adapter, and never raises, whatever other threads do.

Without acceleration, each layer reads the active adapter once per call, so a switch of the default adapter during a
forward pass takes effect from the next layer on; a `use` or `disable` block holds for the whole forward pass of its
thread. The accelerated model keeps both promises.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorakit import LoraConfig, core
from lorakit.speed import accelerate

from ..small_models import llama
from .test_acceleration import MODELS, recipes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*block is open on this model in another thread:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft calls it
]

NAMES = ("first", "second", "third")
CHOICES: tuple[str | None, ...] = (*NAMES, None)
WORKERS = 3
SECONDS = 0.5
IDS = torch.randint(2, 61, (2, 8), generator=torch.Generator().manual_seed(3))


def shared(name: str = "llama", targets: str | list[str] = "all-linear") -> Any:
    """Return a model with three adapters whose outputs differ clearly, in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config.use_cache = False
    for seed, adapter in enumerate(NAMES):
        config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
        core.attach(model, config, adapter, seed=seed)
    return model.eval()


def switch(model: Any, name: str | None) -> None:
    """Make an adapter, or the base, the default of all threads."""
    core.activate(model, *([] if name is None else [name]))


def block(model: Any, name: str | None) -> Any:
    return core.disable(model) if name is None else core.use(model, name)


def embedded(model: Any) -> Tensor:
    x: Tensor = model.get_input_embeddings()(IDS)
    return x.detach().requires_grad_()


def answer(model: Any) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of the thread's own input."""
    x = embedded(model)
    logits = model(inputs_embeds=x).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), x)
    return logits.detach(), gradient


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).norm()) <= 2e-5 * float(theirs.norm()) + 1e-9


def are_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(map(is_close, ours, theirs))


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    """Let the interpreter switch threads after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], None]) -> None:
    """Run functions in threads that start together; raise the first exception that one of them raises."""
    failed: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised in the main thread
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def repeatedly(work: Callable[[], None], seconds: float = SECONDS) -> Callable[[], None]:
    def run() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            work()

    return run


def switching(change: Callable[[str | None], None]) -> Callable[[], None]:
    """Return a function that makes the next adapter active each time."""
    names = itertools.cycle(CHOICES)

    def run() -> None:
        change(next(names))
        time.sleep(1e-4)  # lets forward passes start between two switches

    return run


# ---- blocks: one adapter for the whole forward pass of a thread


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_block_holds_for_the_whole_pass_of_its_thread(name: str) -> None:
    model = shared(name)
    wanted = {}
    for adapter in CHOICES:
        with block(model, adapter):
            wanted[adapter] = answer(model)
    assert {"decoder layer", "encoder layer"} & recipes(accelerate(model))

    def work(own: Iterator[str | None]) -> None:
        adapter = next(own)
        with block(model, adapter):
            assert are_close(answer(model), wanted[adapter])

    workers = [repeatedly(partial(work, itertools.cycle(CHOICES[k:] + CHOICES[:k]))) for k in range(WORKERS)]
    at_once(*workers, repeatedly(switching(partial(switch, model))))


def test_each_thread_computes_its_own_loss_without_logits() -> None:
    model = shared().train()
    labels = {adapter: IDS.masked_fill(k == IDS % 4, -100) for k, adapter in enumerate(CHOICES)}

    def loss(adapter: str | None) -> tuple[Tensor, Tensor]:
        x = embedded(model)
        with block(model, adapter):
            made = model(inputs_embeds=x, labels=labels[adapter]).loss
        return made.detach(), torch.autograd.grad(made, x)[0]

    wanted = {adapter: loss(adapter) for adapter in CHOICES}
    found = accelerate(model, logits=False)
    assert found.loss is not None and model(input_ids=IDS, labels=IDS).logits is None

    def work(adapter: str | None) -> None:
        assert are_close(loss(adapter), wanted[adapter])

    at_once(*(repeatedly(partial(work, adapter)) for adapter in CHOICES), repeatedly(switching(partial(switch, model))))
    assert not found.loss.head.open


# ---- the default: one adapter for each call of a layer

PLACES = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.0.self_attn",
    "model.layers.0.mlp",
    "model.layers.1.input_layernorm",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1",
)


@pytest.mark.costly(cases=4)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("other", ["second", None])
def test_a_switch_in_the_middle_of_a_pass_acts_as_without_acceleration(place: str, other: str | None) -> None:
    model = shared()
    plain = copy.deepcopy(model)
    assert "decoder layer" in recipes(accelerate(model))
    found = []
    for one in (model, plain):
        switch(one, NAMES[0])
        one.get_submodule(place).register_forward_hook(lambda *_, one=one: switch(one, other))
        found.append(answer(one))
    assert are_close(*found)
    with block(plain, NAMES[0]):
        is_last = place == "model.layers.1"
        assert are_close(found[0], answer(plain)) == is_last


class Seen:
    """The calls of a model's layers, (path, input, output), in one list for all threads."""

    def __init__(self, model: Any, layers: Sequence[str]) -> None:
        self.calls: list[tuple[str, Tensor, Tensor]] = []
        for path in layers:
            model.get_submodule(path).register_forward_hook(partial(self.note, path), with_kwargs=True)

    def note(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.calls.append((path, x.detach(), (output[0] if isinstance(output, tuple) else output).detach()))


LAYERS = ("model.layers.0", "model.layers.1")


def check_layers(seen: Seen, outputs: Callable[[str, Tensor], list[Tensor]]) -> None:
    """Check that each recorded output is that of one adapter, and that each adapter occurs."""
    used = set()
    for path, x, y in seen.calls:
        fitting = [k for k, wanted in enumerate(outputs(path, x)) if is_close(y, wanted)]
        assert len(fitting) == 1, (path, fitting)
        used |= {*fitting}
    assert used == set(range(len(CHOICES)))


def layer_output(model: Any, path: str, x: Tensor) -> Tensor:
    turns = model.get_submodule("model.rotary_emb")(x, torch.arange(x.shape[1])[None])
    y = model.get_submodule(path)(x, attention_mask=None, position_embeddings=turns)
    made: Tensor = y[0] if isinstance(y, tuple) else y
    return made


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_each_layer_uses_one_adapter_while_others_switch(target: str) -> None:
    model = shared(targets=[target])
    plain = copy.deepcopy(model)
    assert "decoder layer" in recipes(accelerate(model))
    seen = Seen(model, LAYERS)
    at_once(
        *[repeatedly(lambda: void(answer(model)))] * WORKERS,
        repeatedly(switching(partial(switch, model))),
        repeatedly(switching(partial(switch, model))),
    )

    def outputs(path: str, x: Tensor) -> list[Tensor]:
        found = []
        for name in CHOICES:
            with block(plain, name), torch.no_grad():
                found.append(layer_output(plain, path, x))
        return found

    check_layers(seen, outputs)


def of_peft(target: str) -> Any:
    """Return a model that peft wrapped, with three adapters on the modules of one name, in eval mode."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=[target], init_lora_weights=False)
    model = peft.get_peft_model(llama(use_cache=False), config, NAMES[0]).eval()
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def switch_peft(model: Any, name: str | None) -> None:
    if name is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(name)


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_each_layer_of_peft_uses_one_adapter_while_others_switch(target: str) -> None:
    model = of_peft(target)
    plain, inner = copy.deepcopy(model), model.base_model.model
    assert "decoder layer" in recipes(accelerate(model))
    seen = Seen(inner, LAYERS)
    at_once(*[repeatedly(lambda: void(answer(inner)))] * WORKERS, repeatedly(switching(partial(switch_peft, model))))
    wanted: list[list[Tensor]] = [[] for _ in seen.calls]
    for name in CHOICES:
        switch_peft(plain, name)
        with torch.no_grad():
            for (path, x, _), outputs in zip(seen.calls, wanted, strict=True):
                outputs.append(layer_output(plain.base_model.model, path, x))
    in_order = iter(wanted)
    check_layers(seen, lambda path, x: next(in_order))


class Switching(nn.ModuleDict):
    """A table of a peft layer; each time an adapter is looked up in it, another adapter is made active."""

    change: Callable[[], None]

    def __getitem__(self, key: str) -> nn.Module:
        found = super().__getitem__(key)
        self.change()
        return found


@pytest.mark.parametrize("table", ["lora_A", "lora_B", "lora_dropout"])
def test_a_switch_while_a_layer_of_peft_is_read(table: str) -> None:
    """The layer keeps the adapter with which the call began; the next layer uses the new one."""
    model = of_peft("down_proj")
    plain = copy.deepcopy(model)
    assert "decoder layer" in recipes(accelerate(model))
    found = []
    for one in (model, plain):
        switch_peft(one, NAMES[0])
        held = one.base_model.model.model.layers[0].mlp.down_proj._modules[table]
        held.__class__, held.change = Switching, partial(switch_peft, one, NAMES[1])
        found.append(answer(one.base_model.model))
    assert are_close(*found)


def void(_: object) -> None:
    """Ignore a result."""


# ---- undo, while other threads run


@pytest.mark.parametrize("place", PLACES)
def test_undo_in_the_middle_of_a_pass(place: str) -> None:
    model = shared()
    wanted = answer(model)
    modules = dict(model.named_modules())
    acceleration = accelerate(model)
    handle = model.get_submodule(place).register_forward_hook(lambda *_: acceleration.undo())
    assert are_close(answer(model), wanted)
    handle.remove()
    assert all(module is modules[path] for path, module in model.named_modules())
    assert are_close(answer(model), wanted)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_undo_while_other_threads_run(name: str) -> None:
    model = shared(name)
    wanted = {}
    for adapter in CHOICES:
        with block(model, adapter):
            wanted[adapter] = answer(model)

    def work(adapter: str | None) -> None:
        with block(model, adapter):
            assert are_close(answer(model), wanted[adapter])

    for _ in range(5):
        modules = dict(model.named_modules())
        acceleration = accelerate(model)
        workers = [repeatedly(partial(work, adapter), SECONDS / 5) for adapter in CHOICES]
        at_once(*workers, acceleration.undo, repeatedly(switching(partial(switch, model)), SECONDS / 5))
        assert all(module is modules[path] for path, module in model.named_modules())


def test_no_layer_is_missed_while_layers_are_replaced() -> None:
    """Switching resets each layer's own route, so it must find all layers while `undo` replaces them."""
    model = shared()
    acceleration = accelerate(model)
    state = model.model.layers[0].mlp.down_proj.state
    wanted = {id(layer.__dict__) for layer in state.members()}  # a replacement shares the attributes of its original

    def replace() -> None:
        acceleration.undo()
        for _, swap in acceleration.swaps:
            swap.do()

    def check() -> None:
        assert {id(layer.__dict__) for layer in state.members()} == wanted

    at_once(repeatedly(replace), repeatedly(check))
