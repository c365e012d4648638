"""Threads may share a mask: what attention caches on it is right for each of them."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from lorakit.speed import accelerate
from lorakit.speed.attention import cached_on

from .test_acceleration_threads import CHOICES, IDS, at_once, block, is_close, shared


def test_two_threads_read_a_mask_at_once() -> None:
    mask, both, found = torch.ones(3), threading.Barrier(2), []

    def make() -> float:
        both.wait(10)  # both threads compute the value
        return float(mask.sum())

    at_once(*[lambda: found.append(cached_on(mask, "_total", make))] * 2)
    assert found == [3.0, 3.0]
    assert cached_on(mask, "_total", lambda: 0.0) == 3.0
    mask.mul_(2)
    assert cached_on(mask, "_total", lambda: float(mask.sum())) == 6.0


def test_a_mask_modified_while_it_is_read_is_read_again() -> None:
    mask = torch.ones(3)

    def make() -> float:
        total = float(mask.sum())
        mask.mul_(2)  # as another thread may do
        return total

    assert cached_on(mask, "_total", make) == 3.0
    assert cached_on(mask, "_total", lambda: float(mask.sum())) == 6.0


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_threads_share_a_mask(name: str) -> None:
    model = shared(name)
    visible = torch.ones(8, 8) if name == "bert" else torch.ones(8, 8).tril()
    visible = visible.bool().repeat(2, 1, 1, 1)
    visible[1, :, :, 6:] = False
    hidden = torch.zeros(2, 1, 8, 8).masked_fill(~visible, torch.finfo(torch.float32).min)
    wanted = {}
    with torch.no_grad():
        for adapter in CHOICES:
            with block(model, adapter):
                wanted[adapter] = model(input_ids=IDS, attention_mask=hidden).logits
    accelerate(model)

    for _ in range(20):
        mask = hidden.clone()  # nothing is cached on it yet

        def work(adapter: str | None, mask: Tensor = mask) -> None:
            with block(model, adapter), torch.no_grad():
                assert is_close(model(input_ids=IDS, attention_mask=mask).logits, wanted[adapter])

        at_once(*(partial(work, adapter) for adapter in CHOICES))
