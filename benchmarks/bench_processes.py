"""Claim: two processes with one thread each train at least 0.95 of the tokens per second of one with two threads, and
each holds and sends what `lorakit plan` says: memory within 15%.

    python benchmarks/bench_processes.py [--quick] [--only speed memory gathering] [--models small smollm2] [--steps 8]
        [--rounds 1] [--rows 4] [--length 256] [--parallel ddp fsdp] [--dtypes bfloat16] [--allocators kept pinned]

Speed: `lorakit train`'s step with SmolLM2-135M's geometry and with six of its layers ("small"), random weights, r 16 on
all linear layers, two batches per step. One process computes both batches with two threads; of two processes, each
computes one with one thread. The processes of both sides exist at once, and the sides take one step each in turn.

Memory and bytes: whole runs of `lorakit train` of three steps in two processes, on the packaged SmolLM2-135M. Compared
with the plan of the same run: the peak resident size of each process, the frozen parameters that the first process
holds after a step, and the bytes that it sends in a step, counted from the tensors that it passes to the collectives of
`torch.distributed`. A way of `--parallel` that lorakit does not support is reported and left out. With the allocator
"pinned", malloc returns each large tensor when it is freed; with "kept", it is set up as by the command.

Gathering: the time of a step of the same runs, with more steps, for each way of `--parallel` in turn; the first step is
not counted. What a sharded base adds is the time to gather it.

Rows are appended to results/processes.jsonl. `--quick` takes less than two minutes on two idle cores, and does not fail
if a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench_memory import write_rows
from resident import status
from runner import append_row
from stepping import RATE, TRAINED, Job, adapter_fields, geometry, labels_of, token_ids

PROCESSES = 2
GOAL, BOUND = 0.95, 0.15
MODELS = {"small": 6, "smollm2": None}
"""Name -> layers of SmolLM2-135M, None for all."""
SIDES = {f"1 process, {PROCESSES} threads": (1, PROCESSES), f"{PROCESSES} processes, 1 thread each": (PROCESSES, 1)}
"""Name -> number of processes, and threads of each."""
ONE, SEVERAL = SIDES
DATA, RUN_STEPS = "rows.jsonl", 3
"""Name of the data file, and steps, of the runs whose memory is measured."""
ALLOCATORS = {"kept": {}, "pinned": {"LORAKIT_ALLOCATOR": "stock", "MALLOC_MMAP_THRESHOLD_": "131072"}}
"""Name -> environment variables."""
ONLY = ("speed", "memory", "gathering")
GATHERS = ("all_gather_into_tensor", "all_gather_single")
"""Functions of `torch.distributed` with which releases of torch gather parts of the base."""


def main() -> None:
    options = parsed()
    if options.child:
        asked = json.loads(options.child)
        child_of_speed(asked) if "sides" in asked else print(json.dumps(child_of_memory(asked)))
        return
    missed = list[str]()
    if "speed" in options.only:
        for model in options.models:
            missed += speed(model, options)
    if "memory" in options.only:
        for dtype in options.dtypes:
            for parallel, allocator in itertools.product(options.parallel, options.allocators):
                missed += memory(parallel, dtype, allocator, options)
    if "gathering" in options.only:
        gathering(options)
    if missed and not options.quick:
        raise SystemExit(f"missed: {'; '.join(missed)}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model, three steps of 4 × 64 tokens")
    parser.add_argument("--only", nargs="+", choices=ONLY, default=list(ONLY))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--parallel", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"])
    parser.add_argument("--allocators", nargs="+", choices=list(ALLOCATORS), default=["kept"])
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each side, after the warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="number of new processes for every side")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.models, options.steps, options.rounds, options.length = ["small"], 3, 1, 64
    return options


# --- processes


@contextlib.contextmanager
def started(
    asked: dict[str, Any], count: int, threads: int, allocator: str = "kept"
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start this script in processes that find each other through torch's variables, and end them after a block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    common |= ALLOCATORS[allocator]
    common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, **pipes)
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def answers(processes: Sequence[subprocess.Popen[str]], word: str) -> list[dict[str, Any]]:
    """Send a command to all processes of a side, and return their answers."""
    for process in processes:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(word, file=process.stdin, flush=True)
    return [answer(process) for process in processes]


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the next answer of a process."""
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            return said
    raise SystemExit(f"a process failed:\n{process.stderr.read()}")


# --- speed


def speed(model: str, options: argparse.Namespace) -> list[str]:
    """Measure both sides, append a row for each, and return the goal if it is missed."""
    job = Job(dtype=options.dtypes[0], rows=options.rows, length=options.length, layers=MODELS[model])
    seconds = dict[str, list[float]]({side: [] for side in SIDES})
    for _ in range(options.rounds):
        in_turn(job, options.steps, seconds)
    tokens, facts = PROCESSES * job.tokens, {"model": model, "layers": job.layers, "dtype": job.dtype}
    facts |= {"rows": job.rows, "length": job.length, "batches_per_step": PROCESSES}
    for side, taken in seconds.items():
        samples = {"seconds": taken, "tokens_per_second": [tokens / each for each in taken]}
        append_row("processes", {"what": side, **facts}, samples)
    ratios = [one / several for one, several in zip(seconds[ONE], seconds[SEVERAL], strict=True)]
    append_row("processes", {"what": "speed of several processes", "goal": GOAL, **facts}, {"ratio": ratios})
    ratio = statistics.median(ratios)
    return [] if ratio >= GOAL else [f"{model}: {ratio:.3f} of the tokens per second, goal {GOAL}"]


def in_turn(job: Job, steps: int, seconds: dict[str, list[float]]) -> None:
    """Start the processes of all sides, and let one side take a step at a time; the first steps are not counted."""
    asked = {"sides": list(SIDES), "job": asdict(job)}
    with contextlib.ExitStack() as held:
        running = dict[str, list[subprocess.Popen[str]]]()
        for side, (count, threads) in SIDES.items():  # one after the other, since a side may autotune
            running[side] = held.enter_context(started(asked, count, threads))
            answers(running[side], "step")
        for number in range(steps):
            for side in list(SIDES)[:: 1 if number % 2 else -1]:
                said = answers(running[side], "step")
                seconds[side].append(max(each["seconds"] for each in said))


def child_of_speed(asked: dict[str, Any]) -> None:
    """Take a step per input line, together with the other processes of the side, and print its seconds."""
    from lorakit.allocator import keep_large_blocks

    keep_large_blocks()  # as in `lorakit train`; before torch allocates memory
    from lorakit.train.processes.processes import joined

    with joined() as processes:
        step = prepared(Job(**asked["job"]), processes)
        for number, _ in enumerate(sys.stdin):
            began = time.perf_counter()
            step(number)
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def prepared(job: Job, processes: Any) -> Callable[[int], float]:
    """Return `lorakit train`'s step on this process's batches of a step."""
    import torch

    from lorakit import core
    from lorakit.config import LoraConfig
    from lorakit.data import Batch
    from lorakit.ops.choices import activate
    from lorakit.speed import accelerate, choose
    from lorakit.train.loop.optimizer import build_adamw
    from lorakit.train.loop.step import StepOptions, train_step

    torch.manual_seed(0)
    model = geometry(job).train()
    core.attach(model, LoraConfig(**adapter_fields(job)), TRAINED)
    named, fast = core.trainable_parameters(model, TRAINED), accelerate(model)
    chosen = processes.from_first(lambda: dict(choose(model, job.tokens, job.length).choices))
    options = StepOptions(torch.device("cpu"), 1.0, acceleration=fast, processes=processes)
    optimizer = build_adamw(named, RATE, 0.0)

    def batch(number: int) -> Batch:
        ids = token_ids(model, job, number)
        labels = labels_of(ids, job)
        return Batch(ids, torch.ones_like(ids), labels, 0.0, ids.numel(), int((labels[:, 1:] != -100).sum()))

    def step(number: int) -> float:
        batches = [batch(PROCESSES * number + n) for n in range(processes.rank, PROCESSES, processes.count)]
        with activate(chosen):
            return train_step(model, named, optimizer, batches, RATE, options).loss

    return step


# --- memory and bytes


def memory(parallel: str, dtype: str, allocator: str, options: argparse.Namespace) -> list[str]:
    """Run `lorakit train` in two processes, append a row for each, and return the goals that are missed."""
    case = {"parallel": parallel, "dtype": dtype, "rows": options.rows, "length": options.length}
    with tempfile.TemporaryDirectory() as folder:
        found = trained({**case, "folder": folder, "steps": RUN_STEPS}, allocator)
        if not found:
            return []
        plan = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))["plan"]
    planned, facts, missed = (
        planned_rank(plan, parallel),
        {"model": "smollm2", "allocator": allocator, **case},
        list[str](),
    )
    sent = {"sent": planned.traffic.sent_bytes, "base": planned.base_bytes}
    for what, measured in (("sent", found[0]["sent_bytes"]), ("base", found[0]["base_bytes"])):
        samples = {f"{what}_bytes": [measured], "ratio": [sent[what] / measured]}
        append_row("processes", {"what": f"{what} bytes", **facts, "planned_bytes": sent[what]}, samples)
        missed += _outside(f"{parallel}, {dtype}: {what} bytes", sent[what], measured)
    for rank, each in enumerate(found):
        samples = {"peak_bytes": [each["peak_bytes"]], "ratio": [planned.peak_bytes / each["peak_bytes"]]}
        row = {"what": "memory", **facts, "rank": rank, "planned_bytes": planned.peak_bytes}
        append_row("processes", {**row, "moment": planned.peak_moment}, samples)
        missed += _outside(
            f"{parallel}, {dtype}, {allocator}: memory of process {rank}", planned.peak_bytes, each["peak_bytes"]
        )
    return missed


def trained(case: dict[str, Any], allocator: str = "kept") -> list[dict[str, Any]]:
    """Run `lorakit train` in two processes; return what each has held, sent and needed, or nothing if unsupported."""
    write_rows(Path(case["folder"], DATA), case["length"], PROCESSES * case["rows"] * case["steps"])
    with started(case, PROCESSES, 1, allocator) as processes:
        found = [answer(process) for process in processes]
    if "unsupported" in found[0]:
        print(f"processes: {case['parallel']}: left out: {found[0]['unsupported']}")
        return []
    return found


def gathering(options: argparse.Namespace) -> None:
    """Run `lorakit train` with each way of `--parallel` in turn, and append a row of the seconds of a step for each."""
    facts = {"model": "smollm2", "dtype": options.dtypes[0], "rows": options.rows, "length": options.length}
    seconds = dict[str, list[float]]({parallel: [] for parallel in options.parallel})
    for _ in range(options.rounds):
        for parallel in options.parallel:
            with tempfile.TemporaryDirectory() as folder:
                found = trained({"parallel": parallel, **facts, "folder": folder, "steps": 1 + options.steps})
            seconds[parallel] += found[0]["seconds"][1:] if found else []
    for parallel, taken in seconds.items():
        if taken:
            row = {"what": "step in two processes", "parallel": parallel, **facts}
            append_row("processes", row, {"seconds": taken})


def _outside(what: str, planned: int, measured: int) -> list[str]:
    ratio = planned / measured
    return [] if abs(ratio - 1) <= BOUND else [f"{what}: planned / measured is {ratio:.2f}"]


def planned_rank(values: dict[str, Any], parallel: str) -> Any:
    """Return the plan of a process, given the plan in run.json."""
    from lorakit import hub, plan
    from lorakit.config import LoraConfig
    from lorakit.plan.parallel import rank_plan
    from lorakit.train.settings.defaults import DEFAULTS

    given = {one.name: values["job"][one.name] for one in fields(plan.Job)}
    names = ("r", "lora_alpha", "lora_dropout")
    config = LoraConfig(target_modules="all-linear", **{name: DEFAULTS[name].value for name in names})
    made = plan.estimate(hub.shape_of("smollm2"), config, plan.Job(**given))
    return rank_plan(made, plan.Cluster(PROCESSES), parallel)


def child_of_memory(case: dict[str, Any]) -> dict[str, Any]:
    """Train as the command does, and return what this process has held and sent, and the seconds of each step."""
    from lorakit import allocator
    from lorakit.train.settings.types import SHARDED

    allocator.set_up(is_sharded=case["parallel"] in SHARDED)
    from lorakit.errors import NotYetSupported
    from lorakit.train import TrainSettings, run
    from lorakit.train.progress import Progress

    folder, sent, found = Path(case["folder"]), counted(), dict[str, Any](seconds=[])

    class Phases(Progress):
        """Receiver of the steps; the first process alone reports them."""

        def train_row(self, row: Any) -> None:
            found["sent_bytes"] = sum(sent.values()) - found.get("before", 0)
            found["before"] = sum(sent.values())
            found["base_bytes"] = frozen_bytes()
            found["seconds"].append(row["seconds"])

    settings = TrainSettings(
        model="smollm2",
        data=[str(folder / DATA)],
        output_dir=str(folder / "run"),
        eval_fraction=0.0,
        max_length=case["length"],
        per_device_train_batch_size=case["rows"],
        max_steps=case["steps"],
        dtype=case["dtype"],
        allow_missing_end=True,
        save_steps=case["steps"],
        device="cpu",
        parallel=case["parallel"],
        token_cache=False,
    )
    try:
        run(settings, Phases())
    except NotYetSupported as cause:
        return {"unsupported": str(cause)}
    return {**found, "peak_bytes": status("VmHWM")}


def counted() -> dict[str, int]:
    """Return the bytes that this process sends, by collective; they grow while the collectives are called."""
    from torch import distributed

    from lorakit.plan.parallel import all_gather_bytes, all_reduce_bytes

    sent = {"all_reduce": 0, **dict.fromkeys(GATHERS, 0)}

    def count(name: str, index: int, bytes_of: Callable[[int, int], int]) -> None:
        """Replace a collective by one that counts the tensor that is its argument number `index`."""
        collective = getattr(distributed, name)

        def counting(*tensors: Any, **named: Any) -> Any:
            sent[name] += bytes_of(tensors[index].nbytes, PROCESSES)
            return collective(*tensors, **named)

        setattr(distributed, name, counting)

    count("all_reduce", 0, all_reduce_bytes)
    for name in GATHERS:
        if hasattr(distributed, name):
            count(name, 1, all_gather_bytes)
    return sent


def frozen_bytes() -> int:
    """Return the bytes of the frozen parameters that this process holds; tied parameters count once."""
    import torch

    found = dict[int, int]()
    for one in gc.get_objects():
        if isinstance(one, torch.nn.Parameter) and not one.requires_grad:
            local = one.to_local() if hasattr(one, "to_local") else one
            size = local.numel() * local.element_size()
            found[local.data_ptr()] = min(size, local.untyped_storage().nbytes())
    return sum(found.values())


if __name__ == "__main__":
    main()
