"""Claim: a base whose matmuls run in int8, forward and backward, trains like a bf16 base.

    python benchmarks/bench_int8_parity.py --keep FOLDER [--what before training merging] [--schemes smooth+split]
        [--seeds 0 1 2] [--tasks text instructions] [--steps 60] [--evaluated 105] [--quick]

SmolLM2-135M-Instruct, bf16, r 16 on all linear modules, no dropout, AdamW at 3e-4, 60 steps of 4 × 256 tokens. Task
"text": Python's language reference in windows of 256 tokens. Task "instructions": prompts and answers cut from it,
1,000 characters a row, padded to the longest row; 28.5% of a training row is the answer. The evaluation rows are the
same for all runs, are taken from the whole text at equal distances, and are not trained on; in those of the
instructions the answer is 85% of the row, so that both tasks score more than 20,000 tokens.

A scheme of `int8_schemes.SCHEMES` says how the linear modules of the blocks compute; the head stays in bf16. All use
the arithmetic of `lorakit.ops.int8`, calibrated on eight training rows; q/k/v and gate/up share their input scales.

"before": the difference of the loss per evaluated token to bf16 without an adapter, paired by row, with its standard
error; and the cosine of the gradients of A and B with those of an fp32 model, mean of eight batches, at an adapter that
was trained for five steps in bf16.
"training": bf16 and each scheme train from the same adapter on the same batches; the difference of the loss after
training, that of the two adapters on the bf16 base, and that after merging them into it.
"merging": the same after merging into an fp32 copy of the base, evaluated in fp32.

Results of single runs are kept in FOLDER, so that a stopped benchmark can be continued. Rows are appended to
results/int8_parity.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from int8_schemes import BF16, DEFAULT, SCHEMES, Site, outliers, replace_linears, use
from runner import append_row
from torch import Tensor, nn

from lorakit import core, data, hub
from lorakit.allocator import keep_large_blocks
from lorakit.config import LoraConfig
from lorakit.data import Batch
from lorakit.speed import accelerate
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import StepOptions, train_step

LENGTH, ROWS, RANK, ALPHA, RATE = 256, 4, 16, 32, 3e-4
CALIBRATED, FIRST_STEPS, PROBE, PROBES = 8, 5, 17, 8
"""Rows to calibrate on; bf16 steps before gradients are compared; the seed and the number of the batches for that."""
BOUND_BEFORE, BOUND_AFTER, BOUND_COSINE = 0.005, 0.01, 0.99
HELD_OUT = {"text": 80, "instructions": 105}
"""Task -> its evaluation rows."""
CHARACTERS, TRAINED_ANSWER, EVALUATED_ANSWER = 1000, 0.285, 0.85
"""Length of an instruction, and the fractions of it that are the answer."""

Losses = dict[str, list[float]]
"""The summed loss ("losses") and the scored tokens ("counts") of each evaluation row."""


class Task(NamedTuple):
    """Encoded rows: to train, to evaluate, to calibrate."""

    trained: list[Any]
    evaluated: list[Any]
    calibrated: list[Any]


class Adapted(NamedTuple):
    """A model with a new adapter, its sites, and the options of a training step."""

    model: nn.Module
    sites: dict[str, Site]
    options: StepOptions


def main() -> None:
    keep_large_blocks()
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        options.keep = options.keep or Path(folder)
        options.keep.mkdir(parents=True, exist_ok=True)
        for name in options.tasks:
            task = rows_of(name, options.evaluated)
            for what in options.what:
                PARTS[what](name, task, options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the results of single runs; otherwise they are not kept")
    parser.add_argument("--what", nargs="+", choices=tuple(PARTS), default=["before", "training"])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES)[1:], default=[DEFAULT])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=tuple(HELD_OUT), default=list(HELD_OUT))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--evaluated", type=int, default=max(HELD_OUT.values()), help="evaluation rows at most")
    parser.add_argument("--quick", action="store_true", help="two steps, four evaluation rows, one seed, one task")
    options = parser.parse_args()
    options.probes = PROBES
    if options.quick:
        options.probes = 1
        options.steps, options.evaluated, options.seeds, options.tasks = 2, 4, options.seeds[:1], options.tasks[:1]
    return options


# --- data


def rows_of(name: str, evaluated: int) -> Task:
    """Encode the reference as the rows of a task; at most `evaluated` rows to evaluate."""
    text = "\n".join(one.text for one in data.python_reference() if isinstance(one, data.Document))
    if name == "text":
        trained = held_out = encoded([data.Document(text)])
    else:
        trained, held_out = (encoded(list(instructions(text, part))) for part in (TRAINED_ANSWER, EVALUATED_ANSWER))
    stride = len(trained) // HELD_OUT[name]
    chosen = range(0, stride * HELD_OUT[name], stride)
    first = range(0, len(chosen), max(1, len(chosen) // evaluated))[:evaluated]
    rest = [one for i, one in enumerate(trained) if i not in chosen]
    return Task(rest, [held_out[chosen[i]] for i in first], rest[:: len(rest) // CALIBRATED][:CALIBRATED])


def encoded(records: Sequence[data.Record]) -> list[Any]:
    """Encode records as rows of at most LENGTH tokens."""
    return list(data.encode(list(records), hub.load_tokenizer("smollm2"), LENGTH).sequences)


def instructions(text: str, answer: float) -> Iterator[data.Record]:
    """Cut a text into prompts and answers; `answer` is the fraction of a row that is the answer."""
    for at in range(0, len(text) - CHARACTERS, CHARACTERS):
        middle = at + round(CHARACTERS * (1 - answer))
        yield data.Completion(text[at:middle], text[middle : at + CHARACTERS])


def shuffled(sequences: Sequence[Any], seed: int) -> Iterator[Batch]:
    """Yield batches of ROWS rows in random order, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for at in range(0, len(order) - ROWS + 1, ROWS):
            yield batch_of([sequences[i] for i in order[at : at + ROWS]])


def in_order(sequences: Sequence[Any]) -> Iterator[Batch]:
    """Yield all rows once, in batches of ROWS."""
    for at in range(0, len(sequences), ROWS):
        yield batch_of(sequences[at : at + ROWS])


def batch_of(sequences: Sequence[Any]) -> Batch:
    """Pad rows to the longest."""
    longest = max(len(one.input_ids) for one in sequences)
    ids, labels = (torch.full((len(sequences), longest), fill) for fill in (0, -100))
    mask = torch.zeros_like(ids)
    for i, one in enumerate(sequences):
        size = len(one.input_ids)
        ids[i, :size], mask[i, :size] = torch.as_tensor(one.input_ids), 1
        labels[i, :size] = torch.as_tensor(one.labels)
    return Batch(ids, mask, labels, 0.0, int(mask.sum()), int((labels[:, 1:] != -100).sum()))


# --- model and losses


def adapted(task: Task, seed: int) -> Adapted:
    """Return SmolLM2 with a new adapter; all sites compute in bf16.

    Both sides of a comparison use this model: norms and the loss are fused, the linear modules of the blocks are not.
    """
    model = hub.load_model("smollm2", dtype="bfloat16")
    sites = replace_linears(model, in_order(task.calibrated))
    torch.manual_seed(seed)
    attach(model)
    return Adapted(model.train(), sites, StepOptions(torch.device("cpu"), 1.0, acceleration=accelerate(model)))


def attach(model: nn.Module) -> None:
    """Attach the adapter of all runs."""
    core.attach(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))


def train(one: Adapted, task: Task, seed: int, steps: int) -> list[float]:
    """Train the adapter with the step of `lorakit train`, and return the losses."""
    named = core.trainable_parameters(one.model, "default")
    optimizer, batches = build_adamw(named, RATE, 0.0), shuffled(task.trained, seed)
    return [train_step(one.model, named, optimizer, [next(batches)], RATE, one.options).loss for _ in range(steps)]


def evaluate(model: nn.Module, task: Task) -> Losses:
    """Return the losses of the evaluation rows."""
    losses, counts = list[float](), list[float]()
    model.eval()
    with torch.no_grad():
        for batch in in_order(task.evaluated):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for row, labels in zip(logits, batch.labels, strict=True):
                losses.append(float(nn.functional.cross_entropy(row[:-1].float(), labels[1:], reduction="sum")))
                counts.append(int((labels[1:] != -100).sum()))
    model.train()
    return {"losses": losses, "counts": counts}


def difference(other: Losses, base: Losses) -> dict[str, Any]:
    """Return the difference of two losses per token, paired by row, with its standard error and 95% interval."""
    counts = base["counts"]
    total, n = sum(counts), len(counts)
    apart = [a - b for a, b in zip(other["losses"], base["losses"], strict=True)]
    mean = sum(apart) / total
    error = math.sqrt(sum((d - mean * c) ** 2 for d, c in zip(apart, counts, strict=True)) * n / (n - 1)) / total
    interval = [round(mean - 1.96 * error, 5), round(mean + 1.96 * error, 5)]
    return {"difference": round(mean, 5), "standard_error": round(error, 5), "interval": interval}


def per_token(found: Losses) -> float:
    """Return the loss per scored token."""
    return round(sum(found["losses"]) / sum(found["counts"]), 5)


def cached(options: argparse.Namespace, name: str, work: Callable[[], Losses]) -> Losses:
    """Return losses from the folder, or measure and keep them."""
    file = options.keep / f"{name}, {options.evaluated} rows.json"
    if not file.exists():
        found = work()
        file.write_text(json.dumps(found), encoding="utf-8")
    kept: Losses = json.loads(file.read_text(encoding="utf-8"))
    return kept


# --- before training


def before(name: str, task: Task, options: argparse.Namespace) -> None:
    """Compare the loss and the gradients of each scheme with bf16 and fp32, before training."""
    one = adapted(task, 0)
    train(one, task, 0, FIRST_STEPS)
    probes = list(itertools.islice(shuffled(task.trained, PROBE), options.probes))
    fp32 = in_fp32(core.trainable_parameters(one.model, "default"))
    exact = [gradients(fp32, probe) for probe in probes]
    base = untrained(name, task, one, BF16, options)
    for scheme in [BF16, *options.schemes]:
        losses = untrained(name, task, one, scheme, options)
        use(one.sites, SCHEMES[scheme])
        pairs = list(zip([gradients(one.model, probe) for probe in probes], exact, strict=True))
        cosines = [cosines_of(some, true) for some, true in pairs]
        sites = [cosines_of(by_site(some), by_site(true)) for some, true in pairs]
        facts = {"what": "before training", "task": name, "scheme": scheme, "tokens": sum(base["counts"])}
        facts |= {"loss": per_token(losses), **difference(losses, base), "bound": BOUND_BEFORE}
        facts |= {"cosine": summary(cosines), "cosine_sites": summary(sites)}
        facts |= {"cosine_bound": BOUND_COSINE, "adapter_steps": FIRST_STEPS}
        record(facts, {"outliers": {path: round(x, 1) for path, x in list(outliers(one.sites).items())[:5]}})


def untrained(name: str, task: Task, one: Adapted, scheme: str, options: argparse.Namespace) -> Losses:
    """Return the losses of a scheme without an adapter; the same for all seeds."""

    def work() -> Losses:
        use(one.sites, SCHEMES[scheme])
        with core.disable(one.model):
            return evaluate(one.model, task)

    return cached(options, f"{name}, before, {scheme}", work)


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the gradient of each A and B."""
    model.zero_grad(set_to_none=True)
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    named = core.trainable_parameters(model, "default")
    found = {path: parameter.grad.float() for path, parameter in named if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def in_fp32(named: Sequence[tuple[str, Tensor]]) -> nn.Module:
    """Return an fp32 copy of the bf16 base with an adapter of the given values."""
    model = hub.load_model("smollm2", dtype="bfloat16").float()
    attach(model)
    fill(model, dict(named))
    return model.train()


def fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set the adapter's tensors."""
    with torch.no_grad():
        for path, parameter in core.trainable_parameters(model, "default"):
            parameter.copy_(values[path])


def by_site(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of A and B of each module as one vector."""
    parts: dict[str, list[Tensor]] = {}
    for path, grad in grads.items():
        parts.setdefault(path.partition(".lora_")[0], []).append(grad.flatten())
    return {path: torch.cat(grad) for path, grad in parts.items()}


def cosines_of(some: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the cosine of each pair of gradients."""
    return {
        path: float(nn.functional.cosine_similarity(some[path].flatten(), exact[path].flatten(), 0)) for path in exact
    }


def summary(cosines: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the median, the 5% quantile and the five worst of the tensors' mean cosines, and each batch's median."""
    means = {path: statistics.fmean(one[path] for one in cosines) for path in cosines[0]}
    ascending = dict(sorted(means.items(), key=lambda one: one[1]))
    values = list(ascending.values())
    return {
        "median": round(statistics.median(values), 5),
        "p05": round(values[len(values) // 20], 5),
        "worst": {path: round(value, 4) for path, value in list(ascending.items())[:5]},
        "batches": [round(statistics.median(one.values()), 5) for one in cosines],
    }


# --- training


def training(name: str, task: Task, options: argparse.Namespace) -> None:
    """Train in bf16 and by each scheme, and append a row of the differences per seed and scheme."""
    for seed in options.seeds:
        for scheme in options.schemes:
            base, found = (trained(name, task, seed, one, options) for one in (BF16, scheme))
            facts = {"what": "after training", "task": name, "scheme": scheme, "seed": seed, "steps": options.steps}
            facts |= {"tokens": sum(base["after"]["counts"]), "bounds": [BOUND_BEFORE, BOUND_AFTER]}
            parts = {part: compared(found[part], base[part]) for part in base}
            record(facts | parts, {})


def compared(other: Losses, base: Losses) -> dict[str, Any]:
    """Return two losses per token and their difference."""
    return {"loss": per_token(other), "loss_bf16": per_token(base), **difference(other, base)}


def trained(name: str, task: Task, seed: int, scheme: str, options: argparse.Namespace) -> dict[str, Losses]:
    """Return the losses of a run: before and after training, of its adapter on the bf16 base, and merged into it."""
    made = list[Adapted]()

    def model() -> Adapted:
        if not made:
            made.append(adapted(task, seed))
        return made[0]

    def tuned() -> nn.Module:
        one, file = model(), adapter_file(name, seed, scheme, options)
        if file.exists():
            fill(one.model, torch.load(file, weights_only=True))
        else:
            use(one.sites, SCHEMES[scheme])
            train(one, task, seed, options.steps)
            named = core.trainable_parameters(one.model, "default")
            torch.save({path: value.detach().clone() for path, value in named}, file)
        return one.model

    def scored(part: str) -> Losses:
        chosen, one = tuned(), model()
        use(one.sites, SCHEMES[scheme] if part == "after" else None)
        if part == "merged":
            core.merge(chosen)
        return evaluate(chosen, task)

    key = f"{name}, seed {seed}, {options.steps} steps, {scheme}"
    first = cached(options, f"{name}, before, {scheme}", lambda: untrained(name, task, model(), scheme, options))
    after = cached(options, f"{key}, after", lambda: scored("after"))
    on_bf16 = after if scheme == BF16 else cached(options, f"{key}, on bf16", lambda: scored("on_bf16"))
    merged = cached(options, f"{key}, merged", lambda: scored("merged"))
    return {"before": first, "after": after, "on_bf16": on_bf16, "merged": merged}


def adapter_file(name: str, seed: int, scheme: str, options: argparse.Namespace) -> Path:
    """Return where the adapter of a run is kept."""
    folder: Path = options.keep
    return folder / f"{name}, seed {seed}, {options.steps} steps, {scheme}.pt"


def merging(name: str, task: Task, options: argparse.Namespace) -> None:
    """Compare the adapters of a scheme and of bf16, merged into an fp32 base; "training" must have run before."""
    for seed in options.seeds:
        for scheme in options.schemes:
            base, found = (merged_in_fp32(name, task, seed, one, options) for one in (BF16, scheme))
            facts = {"what": "merged in fp32", "task": name, "scheme": scheme, "seed": seed, "steps": options.steps}
            record(facts | {"tokens": sum(base["counts"]), "bound": BOUND_AFTER, **compared(found, base)}, {})


def merged_in_fp32(name: str, task: Task, seed: int, scheme: str, options: argparse.Namespace) -> Losses:
    """Return the losses of a kept adapter that is merged into an fp32 copy of the base."""

    def work() -> Losses:
        values = torch.load(adapter_file(name, seed, scheme, options), weights_only=True)
        model = in_fp32(list(values.items()))
        core.merge(model)
        return evaluate(model, task)

    return cached(options, f"{name}, seed {seed}, {options.steps} steps, {scheme}, merged in fp32", work)


PARTS: dict[str, Callable[[str, Task, argparse.Namespace], None]] = {
    "before": before,
    "training": training,
    "merging": merging,
}


def record(facts: dict[str, Any], details: dict[str, Any]) -> None:
    """Append a row, and print it."""
    append_row("int8_parity", {**facts, **details}, {})
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
