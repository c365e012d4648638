"""The cases of bench_layer_call.py run what their names say, and every case gets a row."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .loading import load


@pytest.fixture(scope="module")
def bench() -> Any:
    load("benchmarks/runner.py")
    return load("benchmarks/bench_layer_call.py")


def output(cases: list[Any], what: str) -> Tensor:
    """Return the output of one case."""
    (case,) = (case for case in cases if case.what == what)
    with case.block:
        made: Tensor = case.call().detach()
    return made


@pytest.mark.parametrize("mode", ["eval", "train", "train, backward"])
def test_a_case_runs_the_adapters_that_it_names(bench: Any, mode: str) -> None:
    cases = bench.layer_cases(mode)
    model, x = bench.adapted(mode), bench.hidden(mode, 1)
    base = model.layer(x).detach()
    alone = []
    for name in bench.NAMES:
        with bench.lorakit.use(model, name):
            alone.append(model.layer(x).detach())
    for what in ("no active adapter", "disable"):
        torch.testing.assert_close(output(cases, what), base)
    torch.testing.assert_close(output(cases, "1 active adapter"), alone[0])
    torch.testing.assert_close(output(cases, "4 active adapters"), base + sum(one - base for one in alone))
    for what in ("use, one block for all calls", "use, one block per call"):
        torch.testing.assert_close(output(cases, what), alone[1])
    rows = bench.hidden(mode, len(bench.NAMES))
    for number, name in enumerate(bench.NAMES):
        with bench.lorakit.use(model, name):
            expected = model.layer(rows[number : number + 1]).detach()
        torch.testing.assert_close(output(cases, "route of 4 rows")[number : number + 1], expected)
    assert not torch.allclose(alone[0], alone[1])
    assert not torch.allclose(alone[0], base)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_only_the_accelerated_block_does_without_its_own_forward(bench: Any, mode: str) -> None:
    cases = bench.block_cases(mode)
    assert [ran_own_forward(case.call) for case in cases] == [True, False]
    torch.testing.assert_close(output(cases, "decoder block"), output(cases, "decoder block, accelerated"))


def ran_own_forward(call: Any) -> bool:
    """Return whether a call enters the forward of transformers' decoder layer."""
    entered, code = [], inspect.unwrap(LlamaDecoderLayer.forward).__code__  # without the wrapper for checkpointing

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code is code:
            entered.append(frame)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return bool(entered)


@pytest.mark.costly(cases=0)
def test_every_case_gets_a_row(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["runner"], "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_layer_call.py", "--rounds", "2", "--calls", "1"])
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (tmp_path / "layer_call.jsonl").read_text().splitlines()]
    expected = [(case.what, case.mode) for case in bench.all_cases()]
    assert [(row["what"], row["mode"]) for row in rows] == expected
    assert len(set(expected)) == len(expected)
    assert all(row["microseconds"]["n"] == 2 and row["microseconds"]["best"] > 0 for row in rows)
