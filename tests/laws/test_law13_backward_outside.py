"""Law 13: a backward, and a forward that a checkpoint recomputes in it, use the adapter of the original forward.

The backward runs outside the `with` block, under another default, or on another thread. What it must give is what a
plain forward and backward inside the block give; where that cannot be known, it raises and never guesses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.core import activate, attach, checkpoint_contexts, disable, route, use
from lorakit.errors import RouteError

from .tolerances import assert_close, assert_differs
from .zoo import BERT, EVERY_KIND, GPT2, LINEARS, LLAMA, Specimen, output, randomise, with_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),  # it is an evaluation
]
Block = Callable[[nn.Module], contextlib.AbstractContextManager[None]]
BLOCKS: dict[str, Block] = {
    "use-b": lambda m: use(m, "b"),
    "use-ab": lambda m: use(m, "a", "b"),
    "route": lambda m: route(m, ["b", None, "a", "b"]),
    "disable": disable,
}
MODES = ("plain", "reentrant", "non-reentrant", "contexts")


class Stack(nn.Module):
    """Return a model of two blocks like LINEARS, each checkpointed in the given mode."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.first, self.second = LINEARS.model(seed=1), LINEARS.model(seed=2)
        self.between = nn.Linear(7, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self.second, self.between(self._run(self.first, x)))

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.mode == "plain":
            return block(x)
        if self.mode == "reentrant":
            return checkpoint(block, x, use_reentrant=True)
        if self.mode == "contexts":
            return checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts(self))
        return checkpoint(block, x, use_reentrant=False)


def stack(mode: str) -> Stack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Stack(mode)
    for seed, name in enumerate("ab"):
        attach(model, LINEARS.config(target_modules=["up", "square", "out"]), name)
        randomise(model, name, seed + 50)
    return model


def given() -> Tensor:
    return LINEARS.given().requires_grad_()


def gradients(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if x is not None:
        found["x"] = x.grad.clone()
    model.zero_grad()
    return found


def expected(block: Block) -> dict[str, Tensor]:
    model, x = stack("plain"), given()
    with block(model):
        model(x).pow(2).sum().backward()
    return gradients(model, x)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    moved = {name: g for name, g in found.items() if g.abs().max() > 0}
    assert set(moved) == {name for name, g in wanted.items() if g.abs().max() > 0}
    for name, gradient in moved.items():
        assert_close(gradient, wanted[name], torch.float32)


def on_a_thread(work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # handed to the test's own thread
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def test_the_blocks_differ() -> None:
    """Otherwise the tests below could not fail."""
    found = [expected(block)["x"] for block in [*BLOCKS.values(), lambda m: use(m, "a")]]
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            assert_differs(one, other, torch.float32)


@pytest.mark.parametrize("which", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
def test_backward_after_the_block(mode: str, which: str) -> None:
    model, x = stack(mode), given()
    with BLOCKS[which](model):
        loss = model(x).pow(2).sum()
    loss.backward()
    assert_same(gradients(model, x), expected(BLOCKS[which]))


@pytest.mark.parametrize("which", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
def test_backward_inside_another_block(mode: str, which: str) -> None:
    model, x = stack(mode), given()
    with BLOCKS[which](model):
        loss = model(x).pow(2).sum()
    other: Block = disable if which != "disable" else lambda m: use(m, "a")
    with other(model):
        loss.backward()
    assert_same(gradients(model, x), expected(BLOCKS[which]))


@pytest.mark.parametrize("which", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
def test_backward_on_another_thread(mode: str, which: str) -> None:
    model, x = stack(mode), given()
    with BLOCKS[which](model):
        loss = model(x).pow(2).sum()
    on_a_thread(loss.backward)
    assert_same(gradients(model, x), expected(BLOCKS[which]))


@pytest.mark.parametrize("mode", MODES)
def test_backward_after_the_default_changed(mode: str) -> None:
    model, x = stack(mode), given()
    activate(model, "b")
    loss = model(x).pow(2).sum()
    activate(model, "a")
    loss.backward()
    assert_same(gradients(model, x), expected(BLOCKS["use-b"]))


@pytest.mark.parametrize("mode", ["plain", "reentrant", "contexts"])
def test_several_outstanding_forwards_each_get_their_own(mode: str) -> None:
    model = stack(mode)
    inputs, losses = {}, {}
    for which, block in BLOCKS.items():
        inputs[which] = given()
        with block(model):
            losses[which] = model(inputs[which]).pow(2).sum()
    for which in reversed(BLOCKS):
        losses[which].backward()
        assert_same(gradients(model, inputs[which]), expected(BLOCKS[which]))


def test_several_outstanding_forwards_are_never_guessed() -> None:
    model, x, y = stack("non-reentrant"), given(), given()
    with use(model, "a"):
        first = model(x).pow(2).sum()
    with use(model, "b"):
        second = model(y).pow(2).sum()
    for loss in (second, first):
        with pytest.raises(
            RouteError, match=r"the adapter of that forward pass cannot be determined.*checkpoint_contexts\(model\)"
        ):
            loss.backward()


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_outstanding_forwards_of_one_adapter_need_no_guess(mode: str) -> None:
    model, inputs = stack(mode), [given(), given(), given()]
    losses = []
    for x in inputs:
        with use(model, "b"):
            losses.append(model(x).pow(2).sum())
    for loss, x in zip(losses, inputs, strict=True):
        loss.backward()
        assert_same(gradients(model, x), expected(BLOCKS["use-b"]))


@pytest.mark.parametrize("mode", MODES)
def test_one_adapter_after_the_other_never_learns_from_the_wrong_one(mode: str) -> None:
    model = stack(mode)
    for which in ("use-b", "route", "use-ab", "disable", "use-b"):
        x = given()
        with BLOCKS[which](model):
            loss = model(x).pow(2).sum()
        loss.backward()
        assert_same(gradients(model, x), expected(BLOCKS[which]))
        del loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_in_between_is_no_reason_for_a_wrong_answer(mode: str, quiet: Any) -> None:
    model, x = stack(mode), given()
    with use(model, "b"):
        loss = model(x).pow(2).sum()
    with use(model, "a"), quiet():
        model(given().detach())
    loss.backward()
    assert_same(gradients(model, x), expected(BLOCKS["use-b"]))


@pytest.mark.parametrize("first", ["reentrant", "non-reentrant"])
def test_a_plain_forward_beside_a_checkpointed_one_is_not_taken_for_it(first: str) -> None:
    """Reentrant checkpointing leaves no graph inside; the graph that is alive belongs to another forward."""
    model, x, y = stack(first), given(), given()
    with use(model, "b"):
        loss = model(x).pow(2).sum()
    model.mode = "plain"
    with use(model, "a"):
        other = model(y).pow(2).sum()
    try:
        loss.backward()
    except RouteError:
        pass  # the right thing where it cannot be known
    else:
        assert_same(gradients(model, x), expected(BLOCKS["use-b"]))
    model.zero_grad()
    other.backward()
    assert_same(gradients(model, y), expected(lambda m: use(m, "a")))


def test_an_output_without_a_graph_leaves_no_room_for_a_guess() -> None:
    """The site under `disable` has no graph, something behind it has; a graph of another adapter is alive."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.behind = nn.Linear(12, 12), nn.Linear(12, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.behind(self.site(x))

    def once(checkpointed: bool) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Behind()
        attach(model, LINEARS.config(target_modules=["site"]), "a")
        randomise(model, "a", 1)
        model.behind.weight.requires_grad_(True)
        x = LINEARS.given()
        with disable(model):
            loss = (checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)).pow(2).sum()
        other = model(x)  # its graph stays alive
        loss.backward()
        assert other.grad_fn is not None
        return model.behind.weight.grad

    try:
        found = once(True)
    except RouteError:
        return
    assert_close(found, once(False), torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_outstanding_is_forgotten_with_its_graph(mode: str) -> None:
    model = stack(mode)
    for _ in range(3):
        with use(model, "a"):
            model(given())  # dropped without a backward
    x = given()
    with use(model, "a"):
        loss = model(x).pow(2).sum()
    loss.backward()
    assert_same(gradients(model, x), expected(lambda m: use(m, "a")))


def test_no_graph_is_kept_alive() -> None:
    import gc
    import weakref

    model = stack("non-reentrant")
    x = given()
    with use(model, "b"):
        out = model(x)
    watched = weakref.ref(out)
    del out, x
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("mode", ["non-reentrant", "contexts"])
def test_a_second_backward_of_a_retained_graph(mode: str) -> None:
    model, x = stack(mode), given()
    with use(model, "b"):
        loss = model(x).pow(2).sum()
    loss.backward(retain_graph=True)
    gradients(model, x)
    x.grad = None
    loss.backward()
    assert_same(gradients(model, x), expected(BLOCKS["use-b"]))


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "contexts"])
def test_nested_checkpoints(mode: str) -> None:
    model, x = stack(mode), given()
    kwargs: dict[str, Any] = {"use_reentrant": mode == "reentrant"}
    if mode == "contexts":
        kwargs["context_fn"] = checkpoint_contexts(model)
    with use(model, "b"):
        loss = checkpoint(model, x, **kwargs).pow(2).sum()
    loss.backward()
    assert_same(gradients(model, x), expected(BLOCKS["use-b"]))


def test_dropout_of_a_recomputation_is_that_of_its_forward() -> None:
    found = []
    for mode in ("plain", "reentrant", "non-reentrant", "contexts"):
        model = Stack(mode)
        attach(model, LINEARS.config(lora_dropout=0.5), "a", seed=1)
        attach(model, LINEARS.config(lora_dropout=0.5), "b", seed=2)
        randomise(model, "b", 5)
        model.load_state_dict(found[0][0] if found else model.state_dict())
        model.train()
        x = given()
        torch.manual_seed(11)
        with use(model, "b"):
            loss = model(x).pow(2).sum()
        loss.backward()
        found.append((model.state_dict(), gradients(model, x)))
    for _, other in found[1:]:
        assert_same(other, found[0][1])


TRANSFORMERS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "contexts": {"use_reentrant": False},
}


def ready(specimen: Specimen, mode: str | None, **fields: Any) -> nn.Module:
    model = with_adapters(specimen, "a", "b", **fields)
    if mode is not None:
        kwargs: dict[str, Any] = dict(TRANSFORMERS[mode])
        if mode == "contexts":
            kwargs["context_fn"] = checkpoint_contexts(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    return model.train()


@pytest.fixture(autouse=True)
def _quiet_caches() -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("specimen", [GPT2, LLAMA, BERT], ids=str)
@pytest.mark.parametrize("mode", TRANSFORMERS)
@pytest.mark.parametrize("which", ["use-b", "route"])
def test_gradient_checkpointing_of_transformers(specimen: Specimen, mode: str, which: str) -> None:
    found = []
    for each in (None, mode):
        model = ready(specimen, each)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout_p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        with BLOCKS[which](model):
            loss = output(model, specimen.given()).pow(2).mean()
        work = loss.backward
        on_a_thread(work) if which == "route" else work()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(gradient.abs().max() > 0 for gradient in found[0].values())
    assert_same(found[1], found[0])


@pytest.mark.parametrize("fields", [{"modules_to_save": ["classifier"]}, {"bias": "all"}], ids=str)
@pytest.mark.parametrize("mode", TRANSFORMERS)
def test_copies_and_biases_in_a_checkpoint(mode: str, fields: dict[str, Any]) -> None:
    found = []
    for each in (None, mode):
        model = BERT.model()
        attach(model, BERT.config(**fields), "a")
        attach(model, BERT.config(), "b")
        randomise(model, "a", 1)
        randomise(model, "b", 2)
        if each is not None:
            kwargs: dict[str, Any] = dict(TRANSFORMERS[each])
            if each == "contexts":
                kwargs["context_fn"] = checkpoint_contexts(model)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with use(model, "a"):
            loss = output(model, BERT.given()).pow(2).mean()
        activate(model, "b")
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


def test_embeddings_in_a_checkpoint() -> None:
    found = []
    for mode in ("plain", "non-reentrant", "contexts"):
        model = with_adapters(EVERY_KIND, "a", "b")
        with use(model, "b"):
            if mode == "plain":
                out = model(EVERY_KIND.given())
            else:
                context = {"context_fn": checkpoint_contexts(model)} if mode == "contexts" else {}
                out = checkpoint(model, EVERY_KIND.given(), use_reentrant=False, **context)
        out.pow(2).sum().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


PASSES: dict[str, Block] = {
    "base": disable,
    "reference": lambda m: use(m, "a"),
    "mixed": lambda m: route(m, ["a", None, "b", "a"]),
}
"""Forwards without gradients around a training step: what the reference model of preference training gives."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", PASSES)
def test_a_pass_without_gradients_before_and_after_the_forward(mode: str, which: str) -> None:
    """Preference training runs the reference between two forwards of the policy, in the same model."""
    model, x = stack(mode), given()
    wanted = expected(BLOCKS["use-b"])
    for _ in range(3):
        with torch.no_grad(), PASSES[which](model):
            model(given())
        with use(model, "b"):
            loss = model(x).pow(2).sum()
        with torch.no_grad(), PASSES[which](model):
            model(given())
        loss.backward()
        assert_same(gradients(model, x), wanted)
        x.grad = None


def test_a_nested_reentrant_checkpoint_after_a_reference_pass() -> None:
    model, x = stack("reentrant"), given()
    with torch.no_grad(), disable(model):
        checkpoint(model, given(), use_reentrant=True)
    with use(model, "b"):
        loss = checkpoint(model, x, use_reentrant=True).pow(2).sum()
    with torch.no_grad(), use(model, "a"):
        checkpoint(model, given(), use_reentrant=True)
    loss.backward()
    assert_same(gradients(model, x), expected(BLOCKS["use-b"]))


def test_reentrant_forwards_of_several_threads_are_never_guessed() -> None:
    """Each thread numbers its own autograd nodes, so numbers of different threads cannot be compared."""
    model, x, kept = stack("reentrant"), given(), []

    def elsewhere() -> None:
        with use(model, "a"):
            kept.append(model(given()))

    on_a_thread(elsewhere)
    with use(model, "b"):
        loss = model(x).pow(2).sum()
    with pytest.raises(RouteError, match="cannot be determined"):
        loss.backward()
