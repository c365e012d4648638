"""Stacks of factors in mixed batches: what is stacked, how long stacks are cached, and which changes are detected."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import AdapterBank, attach, detach, disable, one_pass, route, use
from lorakit.core.layers import batched
from lorakit.core.routing.state import resolve

from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import LINEARS, randomise, run, with_adapters

NAMES = ["a", "b", "c", "d", "e"]
ROWS = ["b", "a", None, "c", "d", "e", "b"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The adapters of every stack that is made."""
    found: list[list[str]] = []
    make = batched._stack

    def noted(factors: Any, *more: Any) -> Any:
        found.append(list(factors))
        return make(factors, *more)

    monkeypatch.setattr(batched, "_stack", noted)
    return found


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers whose cached stacks are checked, in order."""
    found: list[nn.Module] = []
    still = batched.Stacks.still

    def noted(stacks: Any, layer: Any) -> bool:
        found.append(layer)
        return still(stacks, layer)

    monkeypatch.setattr(batched.Stacks, "still", noted)
    return found


def model_with(*names: str, **fields: Any) -> nn.Module:
    return with_adapters(LINEARS, *names, **fields)


def given() -> Tensor:
    return LINEARS.given(rows=len(ROWS))


def expected(model: nn.Module, rows: list[str | None] = ROWS) -> Tensor:
    answers = []
    for row, name in enumerate(rows):
        with use(model, name) if name else disable(model):
            answers.append(run(model, given())[row])
    return torch.stack(answers)


def test_a_block_that_keeps_makes_them_once(made: list[list[str]]) -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=True)
    for _ in range(3):
        with block:
            assert_close(run(model, given()), expected(model), torch.float32)
    assert made == [["b", "a", "c", "d", "e"]] * 2  # of two sites
    with route(model, ROWS):
        run(model, given())
        run(model, given())
    assert len(made) == 6


def test_few_adapters_in_one_forward_need_none(made: list[list[str]]) -> None:
    model = model_with(*NAMES)
    with route(model, ["a", "b", None, "c", "c", "a", "b"]):
        run(model, given())
    assert not made


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a number": lambda model: model.up.lora_A["c"].weight.mul_(3),
    "a number of B": lambda model: model.up.lora_B["c"].weight.mul_(3),
    "other data": lambda model: setattr(model.up.lora_B["c"].weight, "data", torch.ones(20, 4)),
    "another parameter": lambda model: setattr(model.up.lora_A["c"], "weight", nn.Parameter(torch.ones(4, 12))),
    "the scale": lambda model: model.up.scaling.update(c=7.0),
    "another adapter of that name": lambda model: again(model),
    "without it": lambda model: model.up.remove("c"),
}


def again(model: nn.Module) -> None:
    detach(model, "c")
    attach(model, LINEARS.config(r=9, use_dora=True), "c")
    randomise(model, "c", 77)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_meanwhile_is_seen(change: str) -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=True)
    with torch.no_grad(), block:
        before = run(model, given())
        CHANGES[change](model)
    wanted = expected(model)
    with block:
        after = run(model, given())
    assert_close(after, wanted, torch.float32)
    assert_differs(after[3], before[3], torch.float32)


def test_what_leaves_no_trace_is_seen_where_nothing_is_kept() -> None:
    model = model_with(*NAMES)
    with route(model, ROWS):
        before = run(model, given())
        model.up.lora_A["c"].weight.data.mul_(3)
        after = run(model, given())
    assert_close(after, expected(model), torch.float32)
    assert_differs(after[3], before[3], torch.float32)


def test_stacks_go_with_their_block() -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=True)
    with block:
        run(model, given())
        found, _ = resolve(model.up.state, None, model.up.forwards)
    assert found.kept is not None
    stacks = [weakref.ref(stack.A) for one in found.kept.values() for stack in one.stacks]
    assert stacks
    assert all(stack() is not None for stack in stacks)
    del block, found
    gc.collect()
    assert all(stack() is None for stack in stacks)
    with route(model, ROWS, keep=True):
        run(model, given())
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in copies:
        assert_close(expected(one), expected(model), torch.float32)


def test_what_is_not_plain_goes_one_by_one(made: list[list[str]]) -> None:
    model = model_with("a", "b")
    attach(model, LINEARS.config(use_dora=True), "c")
    attach(model, LINEARS.config(lora_bias=True), "d")
    attach(model, LINEARS.config(r=3, use_rslora=True), "e")
    for seed, name in enumerate("cde"):
        randomise(model, name, seed)
    with route(model, ROWS):
        assert_close(run(model, given()), expected(model), torch.float32)
    assert made == [["b", "a", "e"]] * 2


def test_dropout_acts_where_the_model_trains(made: list[list[str]]) -> None:
    model = model_with(*NAMES, lora_dropout=0.5)
    block = route(model, ROWS, keep=True)
    with block:
        still = run(model, given())
        first, second = (run(model.train(), given()) for _ in range(2))
        assert torch.equal(run(model.eval(), given()), still)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])  # the base alone
    assert len(made) == 4


def test_ranks_far_apart_have_stacks_of_their_own(made: list[list[str]]) -> None:
    model = LINEARS.model()
    for seed, (name, rank) in enumerate({"a": 2, "b": 12, "c": 4, "d": 9, "e": 3}.items()):
        attach(model, LoraConfig(r=rank, target_modules=["square"]), name)
        randomise(model, name, seed)
    with route(model, ROWS):
        assert_close(run(model, given()), expected(model), torch.float32)
    assert made == [["b", "d"], ["a"], ["c", "e"]]


def test_routes_that_share_a_bank_stack_an_adapter_once(made: list[list[str]]) -> None:
    """Batches change; each row's bits stay, also beside other adapters, in more slots, and after a slot changed hands."""
    model, bank = model_with(*NAMES), AdapterBank(2, by_row=True)
    x = given()

    def rows_of(*names: str | None) -> Tensor:
        with route(
            model, [*names, *[None] * (len(x) - len(names))], keep=bank
        ):  # the base's bits may need as many rows
            return run(model, x)[: len(names)]

    first = rows_of("a", "b")
    memory = [stack.A.data_ptr() for stacks in bank.values() for stack in stacks.stacks]
    assert torch.equal(rows_of("a"), first[:1]) and torch.equal(rows_of("a", "c", None)[0], first[0])
    assert made == [["a", "b"]] * 2  # at two sites; "c" was added to them
    assert torch.equal(rows_of("a", "b", "c", "d", "e")[:2], first)
    bank.release("a")
    randomise(model, "a", 5)
    new = rows_of("c", "a")[1]
    assert_close(new, expected(model, ["c", "a"])[1], torch.float32)
    assert_differs(new, rows_of("c", "b")[1], torch.float32)
    assert torch.equal(rows_of("d", "b")[1], first[1])
    for name in NAMES:
        bank.release(name)
    assert not bank and memory


def test_an_adapter_that_cannot_be_stacked_is_beside_those_of_a_bank() -> None:
    model, bank = model_with("a", "b"), AdapterBank(by_row=True)
    attach(model, LINEARS.config(use_dora=True), "c")
    randomise(model, "c", 3)
    for names in (["a", "b"], ["a", "c"], ["b", "a"], ["c", None]):
        with route(model, names, keep=bank):
            assert_close(run(model, given()[:2]), expected(model, names), torch.float32)


def test_gradients_have_the_way_that_records_all_of_them(made: list[list[str]]) -> None:
    model = model_with(*NAMES)
    x = given().requires_grad_()
    with route(model, ROWS, keep=True):
        first = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        assert torch.autograd.grad(first.sum(), x)[0].abs().max() > 0
    assert not made


@pytest.mark.parametrize("keep", [False, True])
def test_a_damaged_adapter_reaches_its_own_rows_only(keep: bool) -> None:
    model = model_with(*NAMES)
    with torch.no_grad():
        model.up.lora_A["a"].weight[0, 0] = torch.nan
        model.square.lora_B["a"].weight[0, 0] = torch.inf
    with route(model, ROWS, keep=keep):
        finite = run(model, given()).isfinite().all(1)
    assert finite.tolist() == [name != "a" for name in ROWS]


def test_the_bases_output_stays_as_whoever_saw_it_has_it() -> None:
    model, seen = model_with(*NAMES), []
    model.up.base_layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with route(model, ROWS):
        run(model, given())
    assert all(torch.equal(now, then) for now, then in seen)


@pytest.mark.parametrize("keep", [False, True])
def test_autocast_and_inference_mode(keep: bool) -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=keep)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = expected(model)
        with block:
            mixed = run(model, given())
    assert mixed.dtype == torch.bfloat16
    assert_close(mixed, wanted, torch.bfloat16)
    with torch.inference_mode(), block:
        assert_close(model(given()), expected(model), torch.float32)
    with block:
        assert_close(run(model, given()), expected(model), torch.float32)


def test_adapters_made_in_inference_mode_are_never_kept(made: list[list[str]]) -> None:
    with torch.inference_mode():
        model = model_with(*NAMES)
        with route(model, ROWS, keep=True):
            first, second = model(given()), model(given())
        assert torch.equal(first, second)
        assert_close(first, expected(model), torch.float32)
    assert len(made) == 4


def test_one_adapter_on_all_rows_is_kept_too(made: list[list[str]]) -> None:
    model = model_with("a", "b")
    block = use(model, "b", keep=True)
    for _ in range(3):
        with block:
            assert_close(run(model, given()), expected(model, ["b"] * len(ROWS)), torch.float32)
    assert made == [["b"]] * 2  # of two sites
    with use(model, "a", "b"):
        wanted = run(model, given())
    with use(model, "a", "b", keep=True):
        assert torch.equal(run(model, given()), wanted)
    assert len(made) == 2  # two on the same rows go one by one


@pytest.mark.parametrize("change", CHANGES)
def test_of_one_adapter_too_what_changes_meanwhile_is_seen(change: str) -> None:
    model = model_with("b", "c")
    block = use(model, "c", keep=True)
    with torch.no_grad(), block:
        before = run(model, given())
        CHANGES[change](model)
    wanted = expected(model, ["c"] * len(ROWS))
    with block:
        after = run(model, given())
    assert_close(after, wanted, torch.float32)
    assert_differs(after, before, torch.float32)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_passes_is_seen(change: str) -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=True)
    with torch.no_grad(), block:
        with one_pass(model):
            before = run(model, given())
        CHANGES[change](model)
        wanted = expected(model)
        with one_pass(model):
            after = run(model, given())
    assert_close(after, wanted, torch.float32)
    assert_differs(after[3], before[3], torch.float32)


def test_one_pass_checks_every_site_once_at_its_start(checks: list[nn.Module], made: list[list[str]]) -> None:
    model = model_with(*NAMES)
    for _ in range(2):  # stacks built in the pass are valid until it ends
        with route(model, ROWS, keep=True), one_pass(model):
            run(model, given())
            run(model, given())
    assert len(made) == 2 * 2 and not checks
    with route(model, ROWS, keep=True):
        run(model, given())
        with one_pass(model):
            assert checks == [model.up, model.square]
            run(model, given())
        assert checks == [model.up, model.square]
        run(model, given())
    assert checks == [model.up, model.square] * 2


def test_one_pass_is_that_of_its_thread_alone(checks: list[nn.Module]) -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=True)
    with block:
        run(model, given())

    def other() -> None:
        with block:
            run(model, given())

    with block, one_pass(model):
        checks.clear()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert checks == [model.up, model.square]


def test_one_pass_of_a_model_without_a_cache_does_nothing() -> None:
    model = model_with("a")
    with one_pass(model), one_pass(nn.Linear(2, 2)):
        assert_close(run(model, given()), expected(model, ["a"] * len(ROWS)), torch.float32)


def test_an_adapter_that_comes_to_a_site_later_is_seen() -> None:
    model = model_with(*NAMES)
    model.up.remove("c")
    block = route(model, ROWS, keep=True)
    with block:
        run(model, given())
    detach(model, "c")
    attach(model, LINEARS.config(), "c")
    randomise(model, "c", 5)
    with block:
        assert_close(run(model, given()), expected(model), torch.float32)


def test_inputs_of_other_shapes_and_dtypes_have_products_of_their_own() -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=True)
    x = torch.randn(len(ROWS), 6, 12)
    for tokens in (1, 6, 1, 2):
        with torch.no_grad(), block:
            mixed = model.up(x[:, :tokens])
        for row, name in enumerate(ROWS):
            with torch.no_grad(), use(model, name) if name else disable(model):
                assert_close(mixed[row], model.up(x[:, :tokens])[row], torch.float32)
    model.double()
    with torch.no_grad(), block:
        assert model.up(x.double()).dtype == torch.float64


def test_gradients_between_two_tokens_are_recorded() -> None:
    model = model_with(*NAMES)
    block = route(model, ROWS, keep=True)
    for _ in range(2):
        with block:
            run(model, given())
            assert model(given().requires_grad_()).requires_grad


@pytest.mark.parametrize("watched", ["hook", "global hook", "forward", "mode"])
def test_an_output_that_others_may_hold_is_not_written_to(watched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_with(*NAMES), []
    base = model.up.base_layer

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if module is base:
            seen.append((output, output.clone()))

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **kwargs or {})
            if func in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
                seen.append((output, output.clone()))
            return output

    if watched == "hook":
        base.register_forward_hook(note)
    if watched == "global hook":
        handle = nn.modules.module.register_module_forward_hook(note)
    if watched == "forward":
        inner = base.forward
        monkeypatch.setattr(base, "forward", lambda x: note(base, (), inner(x)) or seen[-1][0])
    with route(model, ROWS, keep=True):
        for _ in range(2):
            with Noting() if watched == "mode" else torch.no_grad():
                run(model, given())
    if watched == "global hook":
        handle.remove()
    assert seen
    assert all(torch.equal(now, then) for now, then in seen)


def test_without_such_an_eye_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = model_with(*NAMES), []
    own = batched._own
    monkeypatch.setattr(batched, "_own", lambda layer, y0: kept.append(own(layer, y0) is y0) or own(layer, y0))
    with route(model, ROWS, keep=True):
        run(model, given())
    assert kept
    assert all(kept)
