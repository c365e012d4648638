"""Law 6, under threads: 8 threads use 4 adapters of one model at once, and no call gets the output of another."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorakit.peft
from lorakit.core import disable, route, use

from .zoo import LINEARS, run, with_adapters

THREADS, CALLS = 8, 2000
NAMES = ("a", "b", "c", "d")


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_thread_sees_anothers_adapter(dora: bool) -> None:
    model, given = with_adapters(LINEARS, *NAMES, use_dora=dora), LINEARS.given()
    expected = {name: answer_of(model, given, name) for name in (*NAMES, None)}
    wrong: list[str] = []

    def work(seed: int) -> None:
        drawn = random.Random(seed)
        for call in range(CALLS):
            name = drawn.choice([*NAMES, None])
            if call % 5:
                same = torch.equal(answer_of(model, given, name), expected[name])
            else:
                rows = [drawn.choice([*NAMES, None]) for _ in range(4)]
                with route(model, rows):
                    mixed = run(model, given)
                same = all(torch.allclose(mixed[i], expected[row][i], atol=1e-5) for i, row in enumerate(rows))
            if not same:
                wrong.append(f"thread {seed}, call {call}: {name}")
                return

    in_threads(work)
    assert wrong == []


def test_threads_may_share_a_block_that_keeps_stacks() -> None:
    model, given = with_adapters(LINEARS, *NAMES), LINEARS.given()
    expected = {name: answer_of(model, given, name) for name in NAMES}
    blocks = [(rows, route(model, rows, keep=True)) for rows in ([*NAMES], [*reversed(NAMES)], ["a", "a", "d", "c"])]
    wrong: list[int] = []

    def work(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(300):
            rows, block = drawn.choice(blocks)
            with block:
                mixed = run(model, given)
            if not all(torch.allclose(mixed[i], expected[row][i], atol=1e-5) for i, row in enumerate(rows)):
                wrong.append(seed)

    in_threads(work)
    assert wrong == []


def test_the_face_carries_the_route_with_the_call() -> None:
    model = LINEARS.model()
    wrapped = lorakit.peft.get_peft_model(model, LINEARS.config(init_lora_weights=False), "a")
    for name in NAMES[1:]:
        wrapped.add_adapter(name, LINEARS.config(init_lora_weights=False))
    wrapped.eval()
    given = LINEARS.given()
    expected = {name: answer_of(model, given, name) for name in NAMES}
    wrong: list[int] = []

    def work(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(200):
            rows = [drawn.choice(NAMES) for _ in range(4)]
            with torch.no_grad():
                mixed = wrapped(given, adapter_names=rows)
            if not all(torch.allclose(mixed[i], expected[row][i], atol=1e-5) for i, row in enumerate(rows)):
                wrong.append(seed)

    in_threads(work)
    assert wrong == []


def in_threads(work: Callable[[int], None]) -> None:
    """Run work(0), work(1), … each in its own thread, all at once, and wait for all of them."""
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def answer_of(model: Any, given: Any, name: str | None) -> torch.Tensor:
    """Return the output with one adapter on all rows, or of the base, (rows, out)."""
    with use(model, name) if name else disable(model):
        return run(model, given)
