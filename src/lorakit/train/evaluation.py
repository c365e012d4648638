"""Evaluation: the loss and perplexity of a model, or of a base with and without adapters (`lorakit eval`).

The loss is averaged over all tokens that contribute to it. This module does not depend on the training loop.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lorakit import core, hub
from lorakit.data import Batch, Request, Tokenizer, by_length, encode, padding_id, read_records
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.plan.quantized import Quantization
from lorakit.speed import Acceleration, accelerate
from lorakit.train.run_data import SavedTokenizer, max_length_for, pick_device
from lorakit.train.step import loss_sum, oom_advice_for_evaluation, oom_as_run_error


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: Mean cross entropy, in nats, over the tokens that contribute to the loss.
        tokens: Number of tokens that contribute to the loss.
    """

    loss: float
    tokens: int

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
) -> Evaluation | None:
    """Measure the loss, averaged over all tokens that contribute to it, without gradients or dropout.

    Args:
        model: A causal language model; the training mode of each of its modules is restored afterwards.
        batches: Batches of (rows, length) tensors on the CPU.
        device: The model's device.
        stop: Function that is called before each batch; if it returns True, the evaluation stops.
        acceleration: Result of `lorakit.speed.accelerate` on the model, or None.

    Returns:
        The evaluation, or None if it was stopped.

    Raises:
        DataError: None of the tokens in the batches contribute to the loss.
        NonFiniteError: The loss is NaN or infinite.
        RunError: Memory ran out; the message describes the batch and suggests what to change.
    """
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            if stop():
                return None
            with oom_as_run_error(batch, " while evaluating", oom_advice_for_evaluation):
                total += loss_sum(model, batch, device, acceleration).item()
            tokens += batch.trained_tokens
    if tokens == 0:
        text = "No token in the evaluation data contributes to the loss; pass more text with --eval-data."
        raise DataError(text, field="eval_data")
    if not math.isfinite(total):
        text = f"the evaluation loss is {total}; the base or the adapter produces non-finite values."
        raise NonFiniteError(text, what="evaluation loss")
    return Evaluation(total / tokens, tokens)


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
        model: Model directory, Hub id, or packaged model.
        data: Files, directories or Hub data sets to evaluate on.
        adapters: Adapter directories.
        max_length: Maximum sequence length in tokens; the default is lowered to the model's limit if necessary.
        batch_rows: Number of rows in a batch of the longest sequences; batches of shorter sequences have more rows.
        dtype: "auto", "bfloat16" or "float32".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        allow: Names of the `core.load_adapter` checks to override.
        quantization: How to quantize the base, or None.
        request: How the rows of the data are read.
    """

    model: str
    data: Sequence[str]
    adapters: Sequence[str]
    max_length: int
    batch_rows: int
    dtype: str
    device: str
    allow: Collection[str]
    quantization: Quantization | None
    request: Request = field(default_factory=Request)


def compare(
    settings: EvalSettings, say: Callable[[str], None] = lambda _: None, detail: Callable[[str], None] = lambda _: None
) -> list[tuple[str, Evaluation]]:
    """Measure a base model's loss, alone and with each adapter, on the same tokens.

    An adapter that was saved with its own tokenizer (for example, because it adds tokens) is an exception: for this
    adapter, the same data is tokenized with the adapter's tokenizer.

    Args:
        settings: Model, data and adapters.
        say: Function that receives messages, for example about truncated data or an adapter with its own tokenizer.
        detail: Function that receives details: the row and token counts, and the reason for the chosen precision.

    Returns:
        (name, evaluation) pairs: first the base, named "base", then each adapter, named after its directory, in the
        given order.

    Raises:
        ConfigError: The batch size is below 1, or the maximum length is below 2.
        AdapterFileError: An adapter directory does not exist, or its adapter does not match this base.
        LorakitError: The data or the model cannot be used; the error class and message say why.
    """
    if settings.quantization is not None:
        hub.require_quantizer(settings.quantization)
    where = pick_device(settings.device)
    records = read_records(settings.data, settings.request)
    source = hub.resolve(settings.model, say)
    hub.require(source, tokenizer=True)
    bases = [core.inspect_adapter(folder).base for folder in settings.adapters]  # fails before the base is loaded
    length = max_length_for(hub.shape_of(source), settings.max_length)
    tokenizer = hub.load_tokenizer(source)
    encoded = encode(records, tokenizer, length)
    total, *losses = encoded.report.lines()
    detail(f"data: {total}")
    for line in losses:
        say(line)
    batches = partial(by_length, encoded.sequences, settings.batch_rows, padding_id(tokenizer))
    given = []
    for folder in settings.adapters:
        own = own_tokenizer(folder, tokenizer)
        if own is None:
            given.append(batches)
            continue
        say(
            f"{folder}: the adapter has its own tokenizer, so its loss is measured over different tokens than the "
            "base's."
        )
        sequences = encode(records, own, length).sequences
        given.append(partial(by_length, sequences, settings.batch_rows, padding_id(own)))
    choice = hub.choose_dtype(settings.dtype, hub.calibrate(where) if settings.dtype == "auto" else None)
    detail(f"precision: {choice.reason}")
    loaded = hub.load_model(source, choice.dtype, where, quantization=settings.quantization)
    found = {-1: ("base", _measured(loaded, batches, where))}
    # embedding rows added for new tokens stay in the base and would change the losses of later adapters, so adapters
    # with smaller vocabularies go first
    for number in sorted(range(len(bases)), key=lambda n: 0 if (base := bases[n]) is None else base.vocabulary):
        folder, name = settings.adapters[number], f"adapter{number}"
        core.load_adapter(loaded, folder, name, allow=settings.allow)
        with core.use(loaded, name):
            found[number] = folder, _measured(loaded, given[number], where)
        core.detach(loaded, name)
    return [found[number] for number in sorted(found)]


def _measured(model: nn.Module, batches: Callable[[], Iterable[Batch]], where: torch.device) -> Evaluation:
    acceleration = accelerate(model)
    try:
        found = evaluate(model, batches(), where, acceleration=acceleration)
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
