"""A loaded base model with its tokenizer and adapters: generate, chat, evaluate, predict, merge."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any

import torch
from torch import nn

from lorakit import core, hub
from lorakit.choices import MATMUL_IN_DTYPE, MATMUL_IN_INT8
from lorakit.core import AdapterFiles
from lorakit.data import Batch, Conversation, Request, read_records, text_records
from lorakit.durable import JsonObject
from lorakit.errors import MergeError, UsageError
from lorakit.generate import NewToken, Sampling, embedding_weight, generate_batch
from lorakit.session.base_matmul import quantize_for_int8
from lorakit.session.coding import EvalRows, RowsToPredict
from lorakit.session.measuring import (
    Evaluation,
    combined,
    evaluating,
    measure,
    oom_advice_for_evaluation,
    oom_as_run_error,
)
from lorakit.session.prompts import Answer, Remark, conversation, encode_prompts, end_ids, prompt_format, until_ended
from lorakit.session.spec import SessionSpec, read_adapter
from lorakit.session.tokenizers import SavedTokenizer
from lorakit.speed import Acceleration, accelerate, fuse_decoding, multiply_few_rows
from lorakit.tasks import PredictContext, agree_on_padding

AdapterChoice = str | EllipsisType | None
"""Name of an adapter; None for the base; ... for the only adapter, or the base if there is none."""


class Session:
    """A loaded base model with its tokenizer and adapters.

    Methods can be called from several threads: each runs alone, and `stream` and `predict` let others run between
    tokens and batches. If the base or one of their adapters has changed meanwhile, these two raise UsageError. `with`
    closes the session at the end of the block.

    Args:
        spec: The base, the task and the options; the adapters of the spec are not loaded, see `load`.
        tokenizer: The tokenizer with which the model must agree about padding; None if rows are not padded.

    Attributes:
        spec: The base, the task and the options.
        new_modules: Paths of modules that the model's files do not contain, such as a classification head.
        adapters: Name -> files of each loaded adapter, in the order of loading.
        base_rows: Number of rows of the base's embedding, without those that adapters add; 0 if it has none.
        merged: Names of the adapters that were merged into the base in memory.
        base_matmul: How the base is multiplied, "int8" or "dtype".
        remarks: What the user should know.

    Raises:
        LorakitError: The base cannot be loaded, or an adapter of the spec lacks the weights of a new head.
    """

    def __init__(self, spec: SessionSpec, tokenizer: SavedTokenizer | None = None) -> None:
        self.spec = spec
        loaded = spec.load_base(tokenizer)
        self._loaded: hub.LoadedModel | None = loaded
        self.new_modules = loaded.new_modules
        self.adapters: dict[str, AdapterFiles] = {}
        self.merged: tuple[str, ...] = ()
        self.remarks = spec.remarks
        self.base_matmul: str = MATMUL_IN_DTYPE
        self.base_rows = _vocabulary(loaded.model)
        self._tokenizers: dict[str, SavedTokenizer] = {}
        self._lock = threading.RLock()
        self._acceleration: Acceleration | None = None
        self._measuring = 0  # number of blocks that need the acceleration
        if spec.options.accelerated:
            multiply_few_rows(loaded.model)
            if spec.task.task.generates:
                fuse_decoding(loaded.model)

    @classmethod
    def load(cls, spec: SessionSpec, calibration: Sequence[Sequence[int]] = ()) -> Session:
        """Load the base and all adapters of a spec, largest vocabulary first: only a base without adapters can grow.

        Args:
            spec: The base, the adapters and the options.
            calibration: Token ids of texts, such as the prompts, for the input scales of `base_matmul="int8"`, used if
                no run directory has them.

        Raises:
            LorakitError: The base or an adapter cannot be loaded, or the base cannot be quantized.
        """
        session = cls(spec, None if spec.task.task.generates else spec.tokenizer)
        for name, files in spec.largest_first:
            session.load_adapter(name, files)
        if spec.options.base_matmul == MATMUL_IN_INT8:
            session.base_matmul, text = quantize_for_int8(session.model, spec.files, calibration, session.device)
            session.remarks = (*session.remarks, Remark(text))
        return session

    @property
    def model(self) -> Any:
        """The model with its adapters, a transformers model in eval mode.

        Raises:
            UsageError: The session is closed.
        """
        if self._loaded is None:
            raise UsageError("the session is closed; open it again.", field="session")
        return self._loaded.model

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.spec.device

    def close(self) -> None:
        """Release the model."""
        with self._lock:
            self._unaccelerate()
            self._loaded = None
            self.adapters.clear()
            self._tokenizers.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # adapters

    def load_adapter(self, name: str, adapter: str | Path | AdapterFiles) -> None:
        """Load an adapter; a failed call changes nothing.

        Args:
            name: Name of the adapter in this session.
            adapter: Directory of an adapter or a run, or Hub id, or the files that were read from it.

        Raises:
            UsageError: The adapter was trained for another task or other classes.
            LorakitError: The adapter cannot be read or does not match the base; see `lorakit.load_adapter`.
        """
        files = adapter if isinstance(adapter, AdapterFiles) else read_adapter(adapter)
        self.spec.check_adapter(files)
        with self._lock:
            self._unaccelerate()  # an adapter may add rows to the base
            core.load_adapter(self.model, files, name, allow=self.spec.options.allow)
            self.adapters[name] = files
            if self.spec.options.accelerated:  # an adapter may replace linear layers
                multiply_few_rows(self.model)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter; the base keeps rows that were added for its new tokens.

        Args:
            name: Name of a loaded adapter.

        Raises:
            UsageError: No adapter has this name.
        """
        with self._lock:
            self._chosen(name)
            self._unaccelerate()
            core.detach(self.model, name)
            del self.adapters[name]
            self._tokenizers.pop(name, None)

    def _chosen(self, adapter: AdapterChoice) -> str | None:
        """Return the name of the chosen adapter, or None for the base."""
        if isinstance(adapter, EllipsisType):
            if len(self.adapters) > 1:
                listed = ", ".join(self.adapters)
                text = f"the session has several adapters ({listed}); pass adapter=NAME, or None for the base."
                raise UsageError(text, field="adapter", allowed=tuple(self.adapters))
            return next(iter(self.adapters), None)
        if adapter is not None and adapter not in self.adapters:
            listed = ", ".join(self.adapters) or "none"
            text = f"there is no adapter {adapter!r} in this session (loaded: {listed})."
            raise UsageError(text, what=adapter, field="adapter", allowed=tuple(self.adapters))
        return adapter

    @property
    def _as_trained(self) -> SessionSpec:
        """The spec with the adapters that are loaded now: their trainings say how rows are read."""
        facts = [files.sidecar.facts for files in self.adapters.values()]
        return replace(self.spec, adapters=self.adapters, facts=facts) if facts else self.spec

    def _active(self, name: str | None) -> contextlib.AbstractContextManager[None]:
        if not self.adapters:
            return contextlib.nullcontext()
        return core.disable(self.model) if name is None else core.use(self.model, name)

    def _unchanged(self, names: Iterable[str | None]) -> Callable[[], None]:
        """Return a function that raises UsageError if the base or one of these adapters has changed since this call.

        Raises:
            UsageError: An adapter is not loaded, or the session is closed.
        """
        files = {name: self.adapters[name] for name in map(self._chosen, names) if name is not None}
        merged, model = self.merged, self.model

        def check() -> None:
            if self.model is not model or self.merged is not merged:
                raise UsageError("adapters were merged into the base meanwhile; call again.", field="adapter")
            for name, before in files.items():
                if self.adapters.get(name) is not before:
                    text = f"the adapter {name!r} was unloaded or replaced meanwhile; call again."
                    raise UsageError(text, what=name, field="adapter", allowed=tuple(self.adapters))

        return check

    @contextlib.contextmanager
    def _measurement(self) -> Iterator[None]:
        """Keep the model accelerated after `_accelerate`, until the last of such blocks, which may overlap, ends."""
        with self._lock:
            self._measuring += 1
        try:
            yield
        finally:
            with self._lock:
                self._measuring -= 1
                if not self._measuring:
                    self._unaccelerate()

    def _accelerate(self) -> Acceleration | None:
        """Accelerate the model, if the options say so and it is not yet; needs the lock."""
        if self.spec.options.accelerated and self._acceleration is None:
            self._acceleration = accelerate(self.model)
        return self._acceleration

    def _unaccelerate(self) -> None:
        """Restore the model's forward methods; needs the lock."""
        if self._acceleration is not None:
            self._acceleration.undo()
            self._acceleration = None

    # text

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling],
        eos_ids: Iterable[int] = (),
    ) -> Iterator[NewToken]:
        """Continue prompts together, each with its own adapter, yielding tokens as they are generated.

        Args:
            prompts: Token ids of each row.
            adapters: Name of each row's adapter, or None for the base.
            max_new_tokens: Maximum number of new tokens per row.
            sampling: One for all rows, or one per row.
            eos_ids: Ids of the tokens that end a row.

        Raises:
            UsageError: An adapter is not loaded, or has changed meanwhile.
            LorakitError: See `lorakit.generate.generate_batch`.
        """
        with self._lock:
            check = self._unchanged(adapters)
            tokens = generate_batch(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                eos_ids=frozenset(eos_ids),
                adapters=[*adapters] if self.adapters else None,
            )
        return self._locked(tokens, check)

    def _locked(self, tokens: Iterator[NewToken], check: Callable[[], None]) -> Iterator[NewToken]:
        while True:
            with self._lock:
                check()
                token = next(tokens, None)
            if token is None:
                return
            yield token

    def generate(
        self,
        prompt: str | Conversation,
        *,
        adapter: AdapterChoice = ...,
        system: str | None = None,
        chat: bool | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen, so it can be shared
        stop: Sequence[str] = (),
    ) -> Answer:
        """Continue a text, or answer a prompt in the format of the adapter's training data.

        Args:
            prompt: The text, or a conversation.
            adapter: Name of the adapter, None for the base, or ... for the only adapter.
            system: System message before the prompt.
            chat: Whether to use the chat template; None follows the training data of the adapter, or uses the template
                if there is one.
            max_new_tokens: Maximum length of the answer in tokens.
            sampling: How tokens are chosen; greedy by default.
            stop: Texts that end the answer, which does not include them.

        Raises:
            UsageError: The adapter is unknown or was not trained to continue text, or the prompt cannot be formatted.
            LorakitError: See `lorakit.generate.generate_batch`.
        """
        name = self._chosen(adapter)
        (answer,) = self.generate_batch(
            [prompt], [name], system=system, chat=chat, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        return answer

    def generate_batch(
        self,
        prompts: Sequence[str | Conversation],
        adapters: Sequence[str | None],
        *,
        system: str | None = None,
        chat: bool | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen, so it can be shared
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Answer several prompts together, each with its own adapter.

        Args:
            prompts: The prompts; see `generate`.
            adapters: Name of each prompt's adapter, or None for the base.
            system: See `generate`.
            chat: See `generate`.
            max_new_tokens: Maximum length of each answer in tokens.
            sampling: How tokens are chosen.
            stop: See `generate`.

        Returns:
            The answers, in the order of the prompts.

        Raises:
            UsageError: The prompts of these adapters end with different tokens; or see `generate`.
            LorakitError: See `lorakit.generate.generate_batch`.
        """
        answers, tokens = self.begin(
            prompts,
            adapters,
            system=system,
            chat=chat,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
        )
        for token in tokens:
            answers[token.row].add(token)
        return answers

    def begin(
        self,
        prompts: Sequence[str | Conversation],
        adapters: Sequence[str | None],
        *,
        system: str | None = None,
        chat: bool | None = None,
        stop: Sequence[str] = (),
        **how: Any,
    ) -> tuple[list[Answer], Iterator[NewToken]]:
        """Begin to answer prompts as `generate_batch` does: the caller adds each token to the answer of its row.

        Returns:
            The answers, which are empty, and their tokens, which are generated when they are requested.

        Raises:
            UsageError: See `generate_batch`; `how` has its other arguments.
            LorakitError: See `lorakit.generate.generate_batch`.
        """
        self.spec.check_generates()
        if len(prompts) != len(adapters):
            text = f"there are {len(prompts)} prompts, but {len(adapters)} adapters; pass one per prompt."
            raise UsageError(text, field="adapters")
        parts, encoded, endings = list[tuple[str, SavedTokenizer, list[int]]](), list[list[int]](), list[set[int]]()
        for prompt, adapter in zip(prompts, adapters, strict=True):
            name = self._chosen(adapter)
            facts = self.spec.facts if name is None else [self.adapters[name].sidecar.facts]
            tokenizer = self._tokenizer_of(name)
            form, _ = prompt_format(tokenizer, facts, True if isinstance(prompt, Conversation) else chat)
            encoded += encode_prompts([prompt], tokenizer, form, system)
            parts.append((name or "base", tokenizer, encoded[-1]))
            endings.append(end_ids(self.model, tokenizer, form))
        if any(ending != endings[0] for ending in endings):
            text = "the answers of these adapters end with different tokens; generate them in separate calls."
            raise UsageError(text, field="adapters")
        answers = [Answer(*part, stop) for part in parts]
        ends = endings[0] if endings else ()
        return answers, until_ended(answers, self.stream(encoded, adapters, eos_ids=ends, **how))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        adapter: AdapterChoice = ...,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen, so it can be shared
        stop: Sequence[str] = (),
    ) -> Answer:
        """Write the next message of a conversation with the chat template.

        Args:
            messages: Messages with `role` and `content`, as in training data; the last one is not the assistant's.
            tools: JSON schemas of functions that the model may call.
            adapter: Name of the adapter, None for the base, or ... for the only adapter.
            max_new_tokens: Maximum length of the answer in tokens.
            sampling: How tokens are chosen; greedy by default.
            stop: Texts that end the answer, which does not include them.

        Raises:
            DataError: The messages are invalid.
            LorakitError: See `generate`.
        """
        whole = conversation({"messages": [*messages], "tools": [*tools]}, "messages")
        return self.generate(whole, adapter=adapter, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)

    def _tokenizer_of(self, name: str | None) -> SavedTokenizer:
        """Return the tokenizer that an adapter was saved with, else that of the session."""
        if name is None:
            return self.spec.tokenizer
        if name not in self._tokenizers:
            own = hub.adapter_tokenizer(self.adapters[name].folder)
            self._tokenizers[name] = self.spec.tokenizer if own is None else own
        return self._tokenizers[name]

    # rows

    def measure(self, batches: Iterable[Batch], adapter: str | None = None) -> Evaluation:
        """Measure the loss and the metrics of the task on batches.

        Args:
            batches: Batches of (rows, length) tensors on the CPU.
            adapter: Name of the adapter, or None for the base.

        Raises:
            RunError: Memory ran out.
            LorakitError: See `lorakit.session.measuring.combined`.
        """
        with self._lock, self._measurement(), self._active(adapter):
            acceleration = self._accelerate()
            share = measure(self.model, enumerate(batches), self.device, acceleration, self.spec.task.objective)
        evaluation = combined([share])
        assert evaluation is not None  # nothing stops it
        return evaluation

    def evaluate(
        self,
        data: Sequence[str | Path] | str | Path,
        *,
        adapter: AdapterChoice = ...,
        request: Request | None = None,
        max_length: int | None = None,
        batch_rows: int = 8,
    ) -> Evaluation:
        """Measure the loss and the metrics of the task on data.

        Args:
            data: Files, directories or Hub data sets.
            adapter: Name of the adapter, None for the base, or ... for the only adapter.
            request: How the rows are read; by default, as in the training of the adapters.
            max_length: Maximum sequence length in tokens; None selects that of the training, else that of the data.
            batch_rows: Number of rows in a batch of the longest sequences.

        Raises:
            UsageError: The adapter is unknown; or another adapter has added tokens to the base, which would change the
                losses.
            LorakitError: The data cannot be read or does not fit the task.
        """
        name = self._chosen(adapter)
        own_rows = 0 if name is None else self.adapters[name].vocabulary
        if _vocabulary(self.model) > max(self.base_rows, own_rows):
            text = (
                "the base has rows for new tokens of another adapter, so the loss would differ from that in a session "
                "without it; evaluate in such a session."
            )
            raise UsageError(text, what=name, field="adapter")
        if name is None and self.new_modules:
            text = f"the model has no weights for {self.new_modules[0]}; pass the adapter that has them."
            raise UsageError(text, what=self.new_modules[0], field="adapter")
        spec, tokenizer = self._as_trained, self._tokenizer_of(name)
        records = read_records(data, request or spec.request())
        rows = EvalRows(records, max_length=spec.max_length(max_length), batch_rows=batch_rows)
        coding = rows.coding(spec, tokenizer)
        agree_on_padding(coding.task, self.spec.source, [tokenizer], self._loaded)
        return self.measure(coding.coded(tokenizer).batches(), name)

    def predict(
        self,
        data: Sequence[str | Path] | str | Path = (),
        *,
        texts: Sequence[str] = (),
        adapter: AdapterChoice = ...,
        request: Request | None = None,
        max_length: int | None = None,
        batch_rows: int = 16,
    ) -> Iterator[JsonObject]:
        """Predict rows in the order of the data: labels with scores, tags, texts or embeddings.

        Args:
            data: Files, directories or Hub data sets.
            texts: Texts to predict instead.
            adapter: Name of the adapter, None for the base's own head, or ... for the only adapter.
            request: How the rows are read; by default, as in the training of the adapters.
            max_length: Maximum length in tokens; None selects that of the training, else `ASSUMED_LENGTH`.
            batch_rows: Number of rows per batch.

        Returns:
            The predictions as JSON values, as in `lorakit predict`.

        Raises:
            LorakitError: The task generates text, or the rows cannot be read.
        """
        self.spec.check_predicts()
        spec = self._as_trained
        chosen = request or spec.request(needs_label=False)
        records = text_records(texts, chosen) if texts else read_records(data, chosen)
        name, length = self._chosen(adapter), spec.max_length(max_length)
        rows = RowsToPredict.of(self.spec, records, length, batch_rows, self._tokenizer_of(name))
        return self.predictions(rows, name)

    def predictions(self, rows: RowsToPredict, adapter: str | None, max_new_tokens: int = 256) -> Iterator[JsonObject]:
        """Predict encoded rows.

        Args:
            rows: The rows.
            adapter: Name of the adapter, or None for the base's own head.
            max_new_tokens: Maximum length of a generated text in tokens.

        Yields:
            For each row, the prediction of its task as JSON values, with the row's `source` and `line`.

        Raises:
            UsageError: The adapter is not loaded, or has changed meanwhile.
            RunError: Memory ran out.
        """
        task = self.spec.task
        run = task.task.predict
        assert run is not None  # checked by `to_predict`
        context = PredictContext(self.device, task.target, rows.tokenizer, max_new_tokens)
        check = self._unchanged([adapter])
        with self._measurement():
            for batch, records in rows.batches(self.spec):
                with self._lock:
                    check()
                    self._accelerate()
                    with (
                        self._active(adapter),
                        evaluating(self.model),
                        torch.inference_mode(),
                        oom_as_run_error(batch, " while predicting", oom_advice_for_evaluation),
                    ):
                        predicted = run(self.model, batch, records, context)
                for record, values in zip(records, predicted, strict=True):
                    yield {"source": record.source, "line": record.line, **values}

    # the base

    def merge(self, *names: str) -> None:
        """Merge adapters into the base in memory, if that is exact; the session is then a plain model.

        Args:
            names: The adapters; all of them by default. The others are removed.

        Raises:
            MergeError: The merge is not exact or not possible, and nothing was changed; `save_merged` writes a model
                with rounded weights.
        """
        with self._lock:
            chosen = tuple(dict.fromkeys(names)) or tuple(self.adapters)
            for name in chosen:
                self._chosen(name)
                reason = core.explain_inexact_merge(self.model, name)
                if reason is not None:
                    raise MergeError(reason, what=name)
            self._unaccelerate()
            core.merge_and_unload(self.model, *chosen)
            self.merged = (*self.merged, *(str(self.adapters[name].folder) for name in chosen))
            self.adapters.clear()
            self._tokenizers.clear()


def _vocabulary(model: nn.Module) -> int:
    """Return the number of rows of a model's embedding, or 0 if it has none."""
    weight = embedding_weight(model)
    return 0 if weight is None else len(weight)
