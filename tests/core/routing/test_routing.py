"""The active adapter with blocks, threads and tasks: blocks end completely and do not affect other threads."""

from __future__ import annotations

import asyncio
import copy
import itertools
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lorakit.config import LoraConfig
from lorakit.core import activate, attach, detach, disable, merge_and_unload, route, set_trained, use
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import state_of
from lorakit.errors import AdapterError, RouteError

from ...laws.snapshots import bits
from ...laws.zoo import EVERY_KIND, LINEARS, randomise, run, with_adapters

NAMES = ("a", "b", "c", "d")


def answers() -> tuple[torch.nn.Module, dict[str | None, str]]:
    """A model with four adapters, and the bits that each and the base answer."""
    model = with_adapters(LINEARS, *NAMES)
    found: dict[str | None, str] = {}
    for name in NAMES:
        with use(model, name):
            found[name] = bits(run(model, LINEARS.given()))
    with disable(model):
        found[None] = bits(run(model, LINEARS.given()))
    assert len(set(found.values())) == 5
    return model, found


def said(model: torch.nn.Module) -> str:
    return bits(run(model, LINEARS.given()))


def test_the_first_adapter_is_the_default_and_activate_changes_it() -> None:
    model, found = answers()
    assert said(model) == found["a"]
    activate(model, "c")
    assert said(model) == found["c"]
    activate(model)
    assert said(model) == found[None]
    with use(model, "b"):
        activate(model, "d")
        assert said(model) == found["b"]
    assert said(model) == found["d"]


def test_blocks_nest_and_the_innermost_counts() -> None:
    model, found = answers()
    with use(model, "b"):
        with use(model, "c"):
            assert said(model) == found["c"]
            with disable(model):
                assert said(model) == found[None]
            assert said(model) == found["c"]
        assert said(model) == found["b"]
    assert said(model) == found["a"]


def test_the_order_of_active_adapters_does_not_matter() -> None:
    model = with_adapters(EVERY_KIND, "a", "b", "c", dtype=torch.float64)
    results = []
    for order in itertools.permutations("abc"):
        with use(model, *order):
            results.append(run(model, EVERY_KIND.given()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    with use(model, "a", "a"):
        twice = run(model, EVERY_KIND.given())
    with use(model, "a"):
        assert bits(run(model, EVERY_KIND.given())) == bits(twice)


def test_a_block_can_be_entered_again() -> None:
    model, found = answers()
    block = use(model, "b")
    for _ in range(2):
        with block:
            assert said(model) == found["b"]
            with block:
                assert said(model) == found["b"]
        assert said(model) == found["a"]


def test_a_block_is_left_by_any_exception() -> None:
    model, found = answers()
    for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), use(model, "b"):
            raise error
        assert said(model) == found["a"]


def test_blocks_of_two_models_do_not_meet() -> None:
    one, found = answers()
    other, _ = answers()
    with use(one, "b"), use(other, "c"):
        assert (said(one), said(other)) == (found["b"], found["c"])
        with use(one, "d"):
            assert (said(one), said(other)) == (found["d"], found["c"])


def test_a_new_adapter_is_not_active_by_itself() -> None:
    model, found = answers()
    attach(model, LINEARS.config(), "e")
    randomise(model, "e", 99)
    assert said(model) == found["a"]


@pytest.mark.costly(cases=0)
def test_eight_threads_four_adapters_five_hundred_calls() -> None:
    """No answer is another adapter's: each call is compared with the adapter's own bits."""
    model, found = answers()
    given = LINEARS.given()
    wrong: list[tuple[int, str | None]] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for call in range(500):
            name = NAMES[(number * 7 + call) % 4]
            if call % 10 == 9:
                with disable(model):
                    if bits(run(model, given)) != found[None]:
                        wrong.append((number, None))
            with use(model, name):
                if bits(run(model, given)) != found[name]:
                    wrong.append((number, name))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert wrong == []
    assert said(model) == found["a"]


def test_threads_with_mixed_batches_and_one_block_for_all() -> None:
    model, found = answers()
    given = LINEARS.given()
    shared = {name: use(model, name) for name in NAMES}
    rows = [list(order) for order in itertools.islice(itertools.permutations([*NAMES]), 8)]
    expected = []
    for row in rows:
        with route(model, row):
            expected.append(bits(run(model, given)))
    wrong: list[object] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for call in range(100):
            with route(model, rows[number]):
                if bits(run(model, given)) != expected[number]:
                    wrong.append(number)
            name = NAMES[(number + call) % 4]
            with shared[name]:  # one object, entered by several threads at once
                if bits(run(model, given)) != found[name]:
                    wrong.append(name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert wrong == []


def test_tasks_of_one_thread() -> None:
    model, found = answers()
    wrong = []

    async def work(number: int) -> None:
        for call in range(25):
            name = NAMES[(number + call) % 4]
            with use(model, name):
                await asyncio.sleep(0)
                if said(model) != found[name]:
                    wrong.append(name)
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(8)))
        assert said(model) == found["a"]

    asyncio.run(main())
    assert wrong == []


def test_a_task_takes_along_the_block_it_was_made_in() -> None:
    model, found = answers()

    async def inner() -> str:
        return said(model)

    async def main() -> list[str]:
        with use(model, "b"):
            task = asyncio.create_task(inner())
        return [await task, await asyncio.to_thread(said, model)]

    assert asyncio.run(main()) == [found["b"], found["a"]]


def in_a_thread(model: torch.nn.Module) -> tuple[str, list[str]]:
    results: list[tuple[str, list[str]]] = []

    def work() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = said(model)
            assert said(model) == first
        results.append((first, [str(w.message) for w in caught if w.category is RuntimeWarning]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return results[0]


def test_a_thread_does_not_see_the_block_of_another_and_is_told_once() -> None:
    model, found = answers()
    with use(model, "b"):
        for _ in range(3):  # for each new thread, even if the system reuses a number
            answer, told = in_a_thread(model)
            assert answer == found["a"]
            assert len(told) == 1
            assert (
                "another thread" in told[0]
                and "runs with adapter a" in told[0]
                and "in the thread that runs the forward" in told[0]
            )
    assert in_a_thread(model) == (found["a"], [])


def test_a_thread_with_a_block_of_its_own_is_not_told() -> None:
    model, found = answers()
    results: list[str] = []

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with use(model, "c"):
                results.append(said(model))

    with use(model, "b"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert said(model) == found["b"]
    assert results == [found["c"]]


def test_generation_in_a_thread_can_carry_the_context_along() -> None:
    import contextvars

    model, found = answers()
    results: list[str] = []
    with use(model, "b"):
        context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(lambda: results.append(said(model)),))
    thread.start()
    thread.join()
    assert results == [found["b"]]


def test_a_generator_that_is_left_half_way() -> None:
    model, found = answers()

    def stream() -> object:
        with use(model, "b"):
            yield said(model)
            yield said(model)

    running = stream()
    assert next(running) == found["b"]
    running.close()
    assert said(model) == found["a"]


@pytest.mark.parametrize("copies", [0, -1])
def test_copies_of_rows(copies: int) -> None:
    model, _ = answers()
    with pytest.raises(RouteError, match="copies"):
        route(model, ["a"], copies=copies)


def test_rows_that_come_as_beams() -> None:
    model, _ = answers()
    given = LINEARS.given()
    with route(model, ["b", "c"], copies=2):
        mixed = run(model, given)
    with route(model, ["b", "b", "c", "c"]):
        assert bits(run(model, given)) == bits(mixed)
    with route(model, ["b", "c"], copies=2):
        half = run(model, given[:2])
    with route(model, ["b", "c"]):
        assert bits(run(model, given[:2])) == bits(half)


def test_no_row_at_all() -> None:
    model, _ = answers()
    for rows in ([], "abcd"):
        with pytest.raises(RouteError, match="a list with one adapter"):
            route(model, rows)


def test_a_copy_of_the_model_switches_its_own_layers() -> None:
    """Layers are found by the state, without a walk: a copied or unpickled model's are its own."""
    model = with_adapters(LINEARS, "a", "b")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        activate(twin, "b")
        set_trained(twin, {"b": False})
        flags = {name: p.requires_grad for name, p in twin.named_parameters() if "lora_" in name}
        assert flags and all(flag == (".a." in name) for name, flag in flags.items())
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
        assert state_of(model).default.names == ("a",)
        found = {id(m) for m in state_of(twin).members()}
        assert found == {id(m) for m in twin.modules() if isinstance(m, LoraLayer)}


def test_layers_that_left_are_members_no_longer() -> None:
    model = with_adapters(LINEARS, "a")
    state = state_of(model)
    held = [m for m in model.modules() if isinstance(m, LoraLayer)]
    detach(model)
    assert held and state.members() == []


def test_parts_that_were_adapted_apart_are_not_taken_for_one() -> None:
    def halves() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))

    apart = torch.nn.Sequential(halves(), halves())
    for part in apart:
        attach(part, LoraConfig(r=2, target_modules=["0"]))
    grown = halves()
    attach(grown, LoraConfig(r=2, target_modules=["0", "1"]))
    with disable(grown):
        grown.append(copy.deepcopy(grown[1]))
    for model, second in ((apart, "1.0"), (grown, "2")):
        for call in (
            disable,
            activate,
            merge_and_unload,
            detach,
            lambda m: attach(m, LoraConfig(target_modules=["0"])),
        ):
            with pytest.raises(AdapterError, match=rf"0 and {second} were adapted separately"):
                call(model)
    for part in (*apart, grown[2]):
        with disable(part):
            part(torch.ones(1, 3))
