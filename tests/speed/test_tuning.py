"""The fastest method is measured once, with a fake clock, and cached on disk by machine and shape."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import durable
from lorakit.caches import AUTOTUNING
from lorakit.machine import this_machine
from lorakit.ops import choices
from lorakit.ops.kernels import compiled
from lorakit.speed import accelerate, tuning
from lorakit.speed.tuning import TuningTask, attention_tasks, choose, fastest, matmul_tasks

from ..small_models import llama

SIZES = (512, 384)  # (in, out) of the only module: large enough to be measured from 768 rows


class Clock:
    """Seconds that pass only while a method runs, with a given duration."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.ran: list[int] = []

    def __call__(self) -> float:
        return self.now

    def run(self, method: int) -> None:
        self.ran.append(method)
        self.now += self.seconds[method]


def task(clock: Clock, usual: int = 0, others: tuple[int, ...] = (512, 256)) -> TuningTask:
    return TuningTask("a shape", usual, others, lambda: clock.run)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(*SIZES), nn.Linear(8, 8)).requires_grad_(False)


@pytest.fixture
def slices_win(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Forward matmuls are faster 512 rows at a time, backward matmuls are not."""
    clock = Clock({0: 3.0, 512: 2.0, 256: 2.0})
    losing = {0: 3.0, 512: 3.0, 256: 3.0}

    def prepare(rows: int, right: torch.Tensor) -> Callable[[int], object]:
        def run(method: int) -> None:
            clock.ran.append(method)
            clock.now += (clock.seconds if right.stride(0) == 1 else losing)[method] / 1000

        return run

    monkeypatch.setattr(tuning, "_product", prepare)
    monkeypatch.setattr(tuning, "BUSY", math.inf)  # whatever else runs at the same time
    return clock


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({0: 3.0, 512: 2.0, 256: 1.0}, 256),
        ({0: 3.0, 512: 2.0, 256: 1.9}, 512),
        ({0: 3.0, 512: 2.8, 256: 0.1}, 0),  # smaller slices are tried only if larger ones helped
        ({0: 3.0, 512: 3.0, 256: 3.0}, 0),
        ({0: 3.0, 512: 2.6, 256: 2.6}, 512),
    ],
)
def test_another_way_is_taken_where_it_gains_a_tenth(seconds: dict[int, float], best: int) -> None:
    clock = Clock(seconds)
    assert fastest(task(clock), clock) == best


def test_a_clock_too_coarse_to_tell_decides_nothing() -> None:
    clock = Clock({0: 0.0, 512: 0.0})
    assert fastest(task(clock), clock) == 0


@pytest.mark.parametrize(("seconds", "best"), [({0: 3.0, 512: 1.0, 256: 1.0}, 512), ({0: 3.0, 512: 3.0}, 0)])
@pytest.mark.parametrize("disturbed", [(3,), (4,), (5, 8)])  # the runs of the trials: 3 and 4, 5 and 6, ...
def test_two_disturbances_decide_nothing(seconds: dict[int, float], best: int, disturbed: tuple[int, ...]) -> None:
    clock = Clock(seconds)

    def run(method: int) -> None:
        clock.run(method)
        clock.now += 9.0 if len(clock.ran) in disturbed else 0.0

    assert fastest(TuningTask("", 0, (512, 256), lambda: run), clock) == best


def test_a_flat_machine_runs_each_way_once_and_in_three_trials() -> None:
    clock = Clock({0: 1.0, 512: 1.0})
    fastest(task(clock), clock)
    assert clock.ran == [0, 512] * 4


def test_what_is_measured_is_kept_and_asked_once(model: nn.Module, slices_win: Clock, tmp_path: Path) -> None:
    first = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    forward = choices.matmul_name(1000, torch.empty(SIZES[::-1]).t())
    assert first.choices == {forward: 512, forward.replace("1024", "768"): 512}
    assert first.measured == 4  # 768 and 1024 rows, forward and backward
    assert "4 shapes" in str(first) and "2 non-default kernels" in str(first)
    ran = len(slices_win.ran)
    second = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    assert (second.choices, second.measured, str(second)) == (first.choices, 0, "")
    assert len(slices_win.ran) == ran
    third = choose(model, 1200, 0, folder=tmp_path, clock=slices_win)  # new row counts
    assert (third.measured, len(third.choices)) == (2, 3)


def test_what_is_chosen_acts(model: nn.Module, slices_win: Clock, tmp_path: Path) -> None:
    found = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    x, W = torch.randn(1000, SIZES[0]), torch.randn(SIZES[::-1])
    with choices.activate(found.choices):
        torch.testing.assert_close(choices.matmul(x, W.t()), x @ W.t())


def test_the_time_it_takes_is_bounded(
    model: nn.Module, slices_win: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "BUDGET_SECONDS", 0.0)
    found = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    assert (found.measured, found.skipped) == (1, 3)
    assert "Out of time; 3 shapes left for a later run" in str(found)
    assert choose(model, 1000, 0, folder=tmp_path, clock=slices_win).measured == 1  # and continues the next time


@pytest.mark.parametrize(
    "content",
    ["", "no json", "[]", '{"format": 1, "machines": {}}', '{"format": 3, "machines": 3}', "\x00" * 9, "{" * 3000],
)
def test_a_damaged_file_costs_a_measurement(model: nn.Module, slices_win: Clock, tmp_path: Path, content: str) -> None:
    (tmp_path / AUTOTUNING.place).write_text(content)
    found = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    assert found.measured == 4
    assert found.save_error == ""
    assert choose(model, 1000, 0, folder=tmp_path, clock=slices_win).measured == 0


@pytest.mark.parametrize("method", [-1, 3, 512.0, True, "512", None, [512]])
def test_a_way_that_is_none_is_measured_again(model: nn.Module, slices_win: Clock, tmp_path: Path, method: Any) -> None:
    choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    path = tmp_path / AUTOTUNING.place
    content = json.loads(path.read_text())
    (answers,) = content["machines"].values()
    answers.update(dict.fromkeys(answers, method))
    path.write_text(json.dumps(durable.sealed(content)))
    found = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    assert (found.measured, len(found.choices)) == (4, 2)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(model: nn.Module, slices_win: Clock, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    found = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    assert (found.measured, len(found.choices)) == (4, 2)
    assert "the next run measures again" in str(found)


def test_a_cache_that_cannot_be_made(model: nn.Module, slices_win: Clock, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = choose(model, 1000, 0, folder=tmp_path / "file" / "cache", clock=slices_win)
    assert (found.measured, len(found.choices)) == (4, 2)
    assert "cannot be written" in found.save_error and "the next run measures again" in str(found)


def test_a_busy_machine_measures_nothing_and_says_so(
    model: nn.Module, slices_win: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(model, 700, 0, folder=tmp_path, clock=slices_win)
    ran = len(slices_win.ran)
    here = this_machine()
    monkeypatch.setattr(tuning, "BUSY", 1.5)
    monkeypatch.setattr(tuning, "this_machine", lambda: replace(here, cores=2, load=3.1))
    found = choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    assert (len(found.choices), found.measured, found.skipped) == (1, 0, 2)  # earlier results are active
    assert str(found).startswith("Autotuning: the machine is busy; 2 shapes")
    assert len(slices_win.ran) == ran
    for load in (3.0, None):  # or unknown
        monkeypatch.setattr(tuning, "this_machine", lambda load=load: replace(here, cores=2, load=load))
        assert choose(model, 1000, 0, folder=tmp_path / str(load), clock=slices_win).measured == 4


def test_another_machine_and_other_threads_have_answers_of_their_own(
    model: nn.Module, slices_win: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(model, 1000, 0, folder=tmp_path, clock=slices_win)
    here, has_kernels = tuning.machine(), compiled.kernels() is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert choose(model, 1000, 0, folder=tmp_path, clock=slices_win).measured == 4
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert choose(model, 1000, 0, folder=tmp_path, clock=slices_win).measured == 4
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    with monkeypatch.context() as without:
        without.setattr(compiled, "kernels", lambda: None if has_kernels else object())
        assert choose(model, 1000, 0, folder=tmp_path, clock=slices_win).measured == 4
    machines = durable.read_json(tmp_path / AUTOTUNING.place)["machines"]
    assert len(machines) == 4
    assert here in machines
    assert choose(model, 1000, 0, folder=tmp_path, clock=slices_win).measured == 0


def _keep(folder: Path, name: str) -> None:
    for number in range(20):
        tuning.save({f"{name}{number}": 0}, folder)


def test_two_processes_that_write_leave_a_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_keep, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / AUTOTUNING.place).exists():
            durable.read_json(tmp_path / AUTOTUNING.place)  # never a part
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert tuning.read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [AUTOTUNING.place]


def test_only_frozen_weights_on_a_cpu_and_of_some_size_are_asked_about() -> None:
    small, large, odd = nn.Linear(64, 64), nn.Linear(8192, 8192), nn.Linear(*SIZES, device="meta")
    trained = nn.Linear(*SIZES)
    whole = nn.ModuleList([small, large, odd, trained]).requires_grad_(False)
    trained.requires_grad_(True)
    assert list(matmul_tasks(whole, 4096)) == []
    trained.requires_grad_(False)
    assert len(list(matmul_tasks(whole, 4096))) == 2 * len(choices.ROWS)
    assert list(matmul_tasks(whole, 512)) == []


@pytest.mark.parametrize("wins", [True, False])
def test_bf16_goes_through_fp32_where_that_is_faster_and_then_not_in_slices(
    wins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(*SIZES, dtype=torch.bfloat16)).requires_grad_(False)
    clock = Clock({0: 3.0, 1: 2.0 if wins else 3.0, 512: 2.0, 256: 2.0})
    monkeypatch.setattr(tuning, "_through_fp32", lambda right: clock.run)
    monkeypatch.setattr(tuning, "_product", lambda rows, right: clock.run)
    monkeypatch.setattr(tuning, "BUSY", math.inf)
    monkeypatch.setattr(tuning, "BUDGET_SECONDS", math.inf)
    found = choose(model, 1000, 0, folder=tmp_path, clock=clock)
    sides = (model[0].weight, model[0].weight.t())
    through = {choices.fp32_name(right): 1 for right in sides}
    slices = {choices.matmul_name(rows, right): 512 for rows in (768, 1000) for right in sides}
    assert found.choices == (through if wins else slices)
    assert found.measured == (2 if wins else 6)
    assert found.skipped == 0
    assert choose(model, 1000, 0, folder=tmp_path, clock=clock).measured == 0


def test_fp32_is_asked_about_for_a_part_of_a_large_weight_and_from_few_rows() -> None:
    head = nn.Linear(96, 40_000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    asked = list(matmul_tasks(nn.ModuleList([head]), 128))
    assert [q.name for q in asked] == [choices.fp32_name(side) for side in (head.weight, head.weight.t())]
    assert list(matmul_tasks(nn.ModuleList([head]), 127)) == []
    run = asked[0].prepare()
    torch.testing.assert_close(run(1), run(0), rtol=1e-2, atol=1e-2)


def test_small_models_read_no_file(tmp_path: Path) -> None:
    tmp_path.joinpath(AUTOTUNING.place).mkdir()  # which would raise an error
    assert choose(nn.Linear(8, 8).requires_grad_(False), 4096, 4096, folder=tmp_path).choices == {}


def test_nothing_is_measured_where_tensors_have_no_numbers(model: nn.Module, tmp_path: Path) -> None:
    with torch._subclasses.FakeTensorMode():
        assert choose(model, 1000, 0, folder=tmp_path).measured == 0
    assert not list(tmp_path.iterdir())


def test_attention_is_asked_about_up_to_the_longest_row(model: nn.Module) -> None:
    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 4, 2, 64, 256

    assert list(attention_tasks(model, 4096)) == []  # no config, so no heads
    model.config = Config()  # type: ignore[assignment]
    asked = {q.name: (q.default, q.others) for q in attention_tasks(model, 1500)}
    names = [choices.attention_name((4, 2, 64), torch.float32, True, length) for length in (256, 512, 1024)]
    assert asked == dict.fromkeys(names, (0, (1,)))
    assert [(q.default, q.others) for q in attention_tasks(model, 2048)][-1] == (1, (0,))

    class OfLayers:
        per_layer_config = (Config(),)

        def __getattr__(self, name: str) -> object:
            raise RuntimeError(f"{name} differs between layers")

    model.config = OfLayers()  # type: ignore[assignment]
    assert {q.name for q in attention_tasks(model, 1500)} == set(names)


def test_what_is_timed_computes(model: nn.Module) -> None:
    """The scratch operands of each task run through the methods that it compares; no random values are drawn."""

    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 4, 2, 64, 256

    before = torch.get_rng_state()
    asked = list(matmul_tasks(model, 1000))
    assert len(asked) == 4  # forward and backward, of up to 768 and up to 1,024 rows
    for task in asked:
        run = task.prepare()
        out: Any = run(task.default)
        default_result = out.clone()
        for method in task.others:
            out.zero_()  # the methods may write to one tensor
            torch.testing.assert_close(run(method), default_result)
    model.config = Config()  # type: ignore[assignment]
    (asked_of_attention, *_) = attention_tasks(model, 256)
    attend = asked_of_attention.prepare()
    for method in (asked_of_attention.default, *asked_of_attention.others):
        attend(method)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_head_of_an_accelerated_model_is_asked_about() -> None:
    model: Any = llama(hidden_size=64, vocab_size=700).bfloat16().requires_grad_(False)
    head = choices.fp32_name(model.lm_head.weight)
    assert head in {q.name for q in matmul_tasks(model, 256)}
    accelerate(model)
    assert head in {q.name for q in matmul_tasks(model, 256)}
