"""Evaluation: the loss and perplexity of a model, or of a base with and without adapters (`lorakit eval`).

The loss is averaged over all tokens that contribute to it. This module does not depend on the training loop.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from lorakit import core, hub
from lorakit.data import (
    AnyRecords,
    Batch,
    Records,
    Report,
    Request,
    Split,
    Tokenizer,
    few_rows,
    padding_id,
    read_records,
)
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.plan.quantized import Quantization
from lorakit.speed import Acceleration, accelerate
from lorakit.tasks import (
    CAUSAL_LM,
    EncodeOptions,
    LabelOptions,
    Meter,
    Objective,
    Target,
    TaskOnData,
    agree_on_padding,
    evaluation_batches,
    load_model_for,
    task_for,
    task_to_measure,
)
from lorakit.tasks.metrics import Score
from lorakit.train.forecast import SavedTokenizer, max_length_for, pick_device
from lorakit.train.processes import ALONE, Processes
from lorakit.train.row_length import usual_length
from lorakit.train.seen_rows import seen_note
from lorakit.train.step import oom_advice_for_evaluation, oom_as_run_error


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: Mean loss over the targets: for language models, cross entropy in nats over the tokens that contribute to
            the loss.
        tokens: Number of these targets: tokens, or rows for classification and embeddings.
        scores: Name of a metric of the task -> value, or the reason why the data does not define it.
        row_losses: Summed loss of each row (of each batch if the loss compares the rows of a batch); empty if unknown.
        row_counts: Number of targets of each of them.
    """

    loss: float
    tokens: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    row_losses: tuple[float, ...] = field(default=(), compare=False, repr=False)
    row_counts: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Name of a metric of the task -> value; None if the data does not define it."""
        return {name: None if isinstance(value, str) else value for name, value in self.scores.items()}

    @property
    def undefined(self) -> dict[str, str]:
        """Name of a metric without a value -> reason."""
        return {name: value for name, value in self.scores.items() if isinstance(value, str)}

    @property
    def perplexity(self) -> float:
        """The perplexity exp(loss), capped to stay finite, because JSON has no infinity.   [docs/math.md (15)]"""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: str | torch.device,
    stop: Callable[[], bool] = lambda: False,
    acceleration: Acceleration | None = None,
    objective: Objective | None = None,
    processes: Processes = ALONE,
) -> Evaluation | None:
    """Measure the loss, averaged over all targets, and the metrics of a task, without gradients or dropout.

    Args:
        model: A model for the task; the training mode of each of its modules is restored afterwards.
        batches: Batches of (rows, length) tensors on the CPU.
        device: The model's device.
        stop: Function that is called before each batch; if it returns True, the evaluation stops.
        acceleration: Result of `lorakit.speed.accelerate` on the model, or None.
        objective: The loss and the metrics; None selects those of causal language models.
        processes: The processes among which the batches are divided; all of them get the same result.

    Returns:
        The evaluation, or None if it was stopped.

    Raises:
        DataError: None of the tokens in the batches contribute to the loss.
        NonFiniteError: The loss is NaN or infinite.
        RunError: Memory ran out; the message describes the batch and suggests what to change.
    """
    parts, meters, is_stopped = dict[int, _Part](), dict[int, Meter](), False
    objective = objective or CAUSAL_LM.objective(Target())
    with evaluating(model), torch.inference_mode():
        for number, batch in own_batches(batches, processes, stop):
            is_stopped = batch is None
            if batch is None:
                break
            with oom_as_run_error(batch, " while evaluating", oom_advice_for_evaluation):
                parts[number], output = _measure(objective, model, batch, device, acceleration)
                if output is not None and objective.meter is not None and number >= 0:
                    meters[number] = objective.meter()
                    meters[number].add(batch, output)
    parts.pop(IDLE, None)
    return _combined(processes.exchange((parts, meters, is_stopped)))


@dataclass(frozen=True)
class _Part:
    """The evaluation of a batch: its summed loss and its number of targets, and those of its rows, if known."""

    loss: float
    tokens: int
    row_losses: tuple[float, ...]
    row_counts: tuple[int, ...]


def _measure(
    objective: Objective,
    model: nn.Module,
    batch: Batch,
    device: str | torch.device,
    acceleration: Acceleration | None,
) -> tuple[_Part, torch.Tensor | None]:
    """Evaluate a batch; also return the model's output if the objective reads it."""
    counts = None if objective.counts is None else objective.counts(batch)
    if objective.forward is not None and objective.loss is not None:
        output = objective.forward(model, batch, device)
        total = objective.loss(output, batch).item()
        rows: tuple[float, ...] = (total,)
        if counts is not None:
            alone = (replace(batch, labels=batch.labels[at : at + 1]) for at in range(len(counts)))
            rows = tuple(objective.loss(output[at : at + 1], row).item() for at, row in enumerate(alone))
        return _part(total, batch, rows, counts), output
    if objective.label_losses is None or counts is None:
        return _part(objective.loss_sum(model, batch, device, acceleration).item(), batch, (), None), None
    losses = objective.label_losses(model, batch, device, acceleration)
    row_of = torch.repeat_interleave(counts).cpu()
    sums = torch.zeros(len(counts), dtype=torch.float64, device="cpu").index_add_(0, row_of, losses.cpu().double())
    return _part(losses.sum().item(), batch, tuple(sums.tolist()), counts), None


def _part(total: float, batch: Batch, rows: tuple[float, ...], counts: torch.Tensor | None) -> _Part:
    several = (batch.trained_tokens,) if counts is None else tuple(counts.tolist())
    return _Part(total, batch.trained_tokens, rows, several if rows else ())


IDLE = -1
"""Number of a batch that a process computes only because the others compute one more; its result is not used."""


def own_batches(
    batches: Iterable[Batch], processes: Processes, stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, Batch | None]]:
    """Yield the batches that one process evaluates, with their numbers.

    In lockstep, all processes get equally many batches, and stop together.

    Args:
        batches: All batches.
        processes: The processes.
        stop: Function that is called before each batch; if it returns True, None is yielded in place of the batch.
    """
    number, batch, is_together = -1, None, processes.in_lockstep
    for number, batch in enumerate(batches):
        is_asked = not is_together or number % processes.count == 0
        if is_asked and (processes.any(stop()) if is_together else stop()):
            yield number, None
            return
        if number % processes.count == processes.rank:
            yield number, batch
    if is_together and batch is not None and number % processes.count < processes.rank:
        yield IDLE, batch


def _combined(shares: Sequence[tuple[dict[int, _Part], dict[int, Meter], bool]]) -> Evaluation | None:
    """Combine the shares of an evaluation: part and meter of each batch, and whether it was stopped."""
    if any(is_stopped for *_, is_stopped in shares):
        return None
    by_number = {number: part for found, *_ in shares for number, part in found.items()}
    meters = {number: meter for _, found, _ in shares for number, meter in found.items()}
    parts = [by_number[number] for number in sorted(by_number)]  # in the order of one process, for equal rounding
    total, tokens = 0.0, sum(part.tokens for part in parts)
    for part in parts:
        total += part.loss
    ordered = [meters[number] for number in sorted(meters)]
    for other in ordered[1:]:
        ordered[0].merge(other)
    if tokens == 0:
        text = "No token in the evaluation data contributes to the loss; pass more text with --eval-data."
        raise DataError(text, field="eval_data")
    if not math.isfinite(total):
        text = f"the evaluation loss is {total}; the base or the adapter produces non-finite values."
        raise NonFiniteError(text, what="evaluation loss")
    scores = {name: _finite(value) for name, value in (ordered[0].result() if ordered else {}).items()}
    losses = tuple(itertools.chain.from_iterable(part.row_losses for part in parts))
    counts = tuple(itertools.chain.from_iterable(part.row_counts for part in parts))
    return Evaluation(total / tokens, tokens, scores, losses, counts)


def _finite(value: Score) -> Score:
    return value if isinstance(value, str) or math.isfinite(value) else f"the value is {value}"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within a block, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class EvalSettings:
    """Settings for `compare`.

    Attributes:
        model: Model directory, Hub id, packaged model, or resolved source.
        data: Files, directories or Hub data sets to evaluate on.
        adapters: Name of each adapter, such as its directory -> its files.
        max_length: Maximum sequence length in tokens; None selects the length that follows the data, within the model's
            limit.
        batch_rows: Number of rows in a batch of the longest sequences; batches of shorter sequences have more rows.
        dtype: "auto", "bfloat16", "float16" or "float32".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        allow: Names of the `core.load_adapter` checks to override.
        quantization: How to quantize the base, or None.
        request: How the rows of the data are read.
        task: The task of the adapters; None chooses it by the data and the model.
        labels: How the labels of the data are read.
    """

    model: str | hub.ModelSource
    data: Sequence[str]
    adapters: Mapping[str, core.AdapterFiles]
    max_length: int | None
    batch_rows: int
    dtype: str
    device: str
    allow: Collection[str]
    quantization: Quantization | None
    request: Request = field(default_factory=Request)
    task: TaskOnData | None = None
    labels: LabelOptions = field(default_factory=LabelOptions)


def compare(
    settings: EvalSettings, say: Callable[[str], None] = lambda _: None, detail: Callable[[str], None] = lambda _: None
) -> list[tuple[str, Evaluation]]:
    """Measure a base model's loss and metrics, alone and with each adapter, on the same data.

    An adapter that was saved with its own tokenizer (for example, because it adds tokens) is an exception: for this
    adapter, the same data is tokenized with the adapter's tokenizer. If the adapters' tokenizers differ from the base's
    only in the same chat template, the base is measured with it, as in training. A base without a head for the task, or
    whose chat template does not render the data, is not measured alone.

    Args:
        settings: Model, data and adapters.
        say: Function that receives messages, for example about truncated data or an adapter with its own tokenizer.
        detail: Function that receives details: the row and token counts, and the reason for the chosen precision.

    Returns:
        (name, evaluation) pairs: first the base, named "base", then each adapter, in the given order.

    Raises:
        ConfigError: The batch size is below 1, or the maximum length is below 2.
        AdapterFileError: An adapter does not match this base.
        LorakitError: The data or the model cannot be used; the error class and message say why.
    """
    if settings.quantization is not None:
        hub.require_quantizer(settings.quantization)
    where = pick_device(settings.device)
    records = read_records(settings.data, settings.request)
    source = hub.resolve(settings.model, say)
    hub.require(source, tokenizer=True)
    task = (
        task_to_measure(records, source, settings.labels)
        if settings.task is None
        else task_for(None, Split(records, Records(), ""), source, settings.labels, settings.task)
    )
    tokenizer = _common_tokenizer(source, [files.folder for files in settings.adapters.values()])
    length = max_length_for(hub.shape_of(source), settings.max_length, lambda: usual_length(records, tokenizer, task))
    coding = _Coding(task, length, settings.batch_rows)
    owned = {folder: own_tokenizer(str(files.folder), tokenizer) for folder, files in settings.adapters.items()}
    tokenizers = [tokenizer, *(own for own in owned.values() if own is not None)]
    agree_on_padding(task, source, tokenizers)
    batches, coded = coding.all_batches(records, tokenizer, owned, say, detail)
    for files in settings.adapters.values():
        seen = seen_note(files.folder, files.sidecar.facts, records)
        if seen is not None:
            say(seen)
    choice = hub.choose_dtype(settings.dtype, where)
    detail(f"precision: {choice.reason}")
    folders = [files.folder for files in settings.adapters.values()]
    how = hub.LoadOptions(choice.dtype, where, settings.quantization)
    base = load_model_for(task, source, how, tokenizer, folders)
    loaded, name, alone, found = base.model, "adapter", list[tuple[str, Evaluation]](), dict[str, Evaluation]()
    if batches is not None and base.new_modules:
        say(f"The model has no weights for {', '.join(base.new_modules)}, so it is measured only with adapters.")
    elif batches is not None:
        alone = [("base", _measured(loaded, batches, where, task))]
    # embedding rows added for new tokens stay in the base and would change the losses of later adapters, so adapters
    # with smaller vocabularies go first
    for folder, files in sorted(settings.adapters.items(), key=lambda item: item[1].vocabulary):
        core.load_adapter(loaded, files, name, allow=settings.allow)
        with core.use(loaded, name):
            found[folder] = _measured(loaded, coded[folder], where, task)
        core.detach(loaded, name)
    return [*alone, *((folder, found[folder]) for folder in settings.adapters)]


def _common_tokenizer(source: hub.ModelSource, folders: Iterable[Path]) -> SavedTokenizer:
    """Return the base's tokenizer, with the adapters' chat template if that alone differs and all have the same."""
    tokenizer = hub.load_tokenizer(source)
    found = [own_tokenizer(str(folder), tokenizer) for folder in folders]
    owned = [own for own in found if own is not None and hub.tokenizer_hash(own) == hub.tokenizer_hash(tokenizer)]
    templates = {hub.chat_template_hash(own) for own in owned}
    return owned[0] if len(owned) == len(found) and len(templates) == 1 else tokenizer


_Batches: TypeAlias = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class _Coding:
    """How records become batches: the task, the maximum length, and the rows per batch of the longest sequences."""

    task: TaskOnData
    length: int
    rows: int

    def all_batches(
        self,
        records: AnyRecords,
        tokenizer: Tokenizer,
        owned: Mapping[str, SavedTokenizer | None],
        say: Callable[[str], None],
        detail: Callable[[str], None],
    ) -> tuple[_Batches | None, dict[str, _Batches]]:
        """Return the batches of the base, or None if its tokenizer cannot render the data, and those of each adapter.

        Args:
            records: The data.
            tokenizer: The base's tokenizer.
            owned: Name of each adapter -> its own tokenizer, or None.
            say: Function that receives messages.
            detail: Function that receives the row and token counts.

        Raises:
            DataError: An adapter's tokenizer, or the base's if it is used, cannot render the data.
        """
        found = {name: self.batches(records, own) for name, own in owned.items() if own is not None}
        try:
            base = self.batches(records, tokenizer)
        except DataError as cause:
            if not found or len(found) < len(owned):
                raise
            base = None
            say(f"The base is not measured, because only the adapter's tokenizer renders the data. {cause}")
        report = (base or next(iter(found.values())))[1]
        total, *losses = report.lines()
        detail(f"data: {total}")
        few = few_rows(report.sequences, self.task.target.kind == "class", "Measure more rows.")
        for line in [*losses, *filter(None, [few])]:
            say(line)
        for name in found if base is not None else ():
            own = f"{name}: the adapter has its own tokenizer"
            say(f"{own}, so its loss is measured over different tokens than the base's.")
        shared = {} if base is None else dict.fromkeys(owned, base)
        return base and base[0], {name: batches for name, (batches, _) in {**shared, **found}.items()}

    def batches(self, records: AnyRecords, tokenizer: Tokenizer) -> tuple[_Batches, Report]:
        """Return a function that returns the batches, and the counts of the data."""
        encoded = self.task.task.encode(records, tokenizer, self.task.target, EncodeOptions(self.length))
        task, pad = self.task, padding_id(tokenizer)
        collate, sequences = task.objective.collate, encoded.sequences
        return partial(evaluation_batches, task.task, collate, sequences, self.rows, pad), encoded.report


def _measured(model: nn.Module, batches: _Batches, where: torch.device, task: TaskOnData) -> Evaluation:
    acceleration = accelerate(model)
    try:
        found = evaluate(model, batches(), where, acceleration=acceleration, objective=task.objective)
    finally:
        acceleration.undo()  # the next adapter may add embedding rows to the base
    if found is None:  # for the type checker only: nothing stops this evaluation
        raise RunError("The evaluation was stopped.", field="data")
    return found


def own_tokenizer(folder: str, tokenizer: Tokenizer) -> SavedTokenizer | None:
    """Return the tokenizer in an adapter's directory if it differs from the base's, else None.

    Args:
        folder: The adapter's directory.
        tokenizer: The base's tokenizer.

    Raises:
        ModelError: The tokenizer cannot be read.
    """
    found = hub.adapter_tokenizer(Path(folder))
    if found is None:
        return None
    same = hub.tokenizer_hash(found) == hub.tokenizer_hash(tokenizer)
    return None if same and hub.chat_template_hash(found) == hub.chat_template_hash(tokenizer) else found
