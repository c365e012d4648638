"""Probe a model: run it on a few random tokens, record the calls to its modules, and restore the model.

Probes run in eval mode without gradients. Some models build rotary caches or masks on their first call, or switch their
attention implementation for short inputs, so flags, attributes, children, hooks, buffers, forward histories and random
state are restored afterwards, and the modules contain the same objects as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit.ops.cross_entropy import IGNORED
from lorakit.speed.patching import Forwards

COPIED = 1 << 20
"""Buffers of up to this many elements are copied before a probe, so that in-place writes can be undone."""


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore a model, except for its parameters, and torch's random generators after a context. Within it, modules
    have an empty forward history, so that no later backward pass sees its forward passes.
    """
    saved = [_Held(module) for module in model.modules()]
    buffers = [buffer for buffer in model.buffers() if buffer.numel() <= COPIED and not buffer.is_inference()]
    before = [(buffer, buffer.detach().clone(), buffer._version) for buffer in buffers]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module in saved:
            module.restore()
        with torch.no_grad():
            for buffer, values, version in before:
                if buffer._version != version:
                    buffer.copy_(values)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters of a model within a context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Held:
    """Saved attributes of a module, and saved contents of its dictionaries (parameters, buffers, children, hooks)."""

    def __init__(self, module: nn.Module) -> None:
        self.now: dict[str, Any] = module.__dict__
        self.attributes = dict(self.now)
        tables = [value for name, value in self.now.items() if name[0] == "_" and isinstance(value, (dict, set))]
        self.tables = [(table, table.copy()) for table in tables]
        for name, value in self.attributes.items():
            if isinstance(value, Forwards):
                self.now[name] = Forwards()

    def restore(self) -> None:
        """Restore all attributes, including the contents of dictionaries."""
        for name in self.now.keys() - self.attributes.keys():
            del self.now[name]
        self.now.update(self.attributes)
        for table, before in self.tables:
            if table or before:
                table.clear()
                table.update(before)


Result = TypeVar("Result")

ModelOutput = Mapping[str, Any] | tuple[Any, ...]
"""Output of a transformers model."""

ROWS, TOKENS = 2, 9
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest allowed relative difference: a few rounding errors, far less than the effect of a different computation."""


@dataclass(frozen=True)
class Call:
    """A call to a module, and its return value."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> Tensor | None:
        """Return the hidden states (…, d) that the module received, or None."""
        return self.args[0] if self.args else self.kwargs.get("hidden_states")


Calls = Mapping[str, Call]
"""Dict from the path of a module to its recorded call."""

Pairs = list[tuple[Tensor | None, Tensor]]
"""Pairs of outputs (…): the fused `forward`'s (None if it does not support the call), and the module's own."""


def attempt(run: Callable[[], Result]) -> Result | Exception:
    """Run a probe and return its result, or the exception that it raised, for which the caller skips the module. A
    probe runs third-party model code, which may raise any. KeyboardInterrupt and SystemExit propagate.
    """
    try:
        return run()
    except Exception as failed:  # noqa: BLE001 - the caller reports the exception's type and skips the module
        return failed


class _Enough(Exception):
    """Exception that ends a forward pass early because no further modules need to run."""


def calls(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    rows: int = ROWS,
    tokens: int = TOKENS,
    *,
    stop: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Call], ModelOutput | None]:
    """Run a model once on `inputs` or on random tokens, inside `eval_mode`, and record calls to modules by path.

    Returns the last call to each module that was called, and the model's output, or None if `stop` ended the forward
    pass as soon as all modules had been called. Any exception of the model propagates.
    """
    recorded: dict[str, Call] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            recorded[path] = Call(args, dict(kwargs), output)
            if stop and len(recorded) == len(modules):
                raise _Enough

        return hook

    handles = [module.register_forward_hook(keep(path), with_kwargs=True) for path, module in modules.items()]
    output: ModelOutput | None = None
    try:
        with contextlib.suppress(_Enough):
            output = model(**(inputs_of(model, rows, tokens) if inputs is None else inputs))
    finally:
        for handle in handles:
            handle.remove()
    return recorded, output


EMBEDDINGS = "get_input_embeddings"
"""Name of the method that returns the input embeddings of a transformers model."""


def token_ids(model: nn.Module, rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    """Return a few random token ids (rows, tokens), without using torch's global generator.

    For an encoder-decoder model with an end token, each row ends with this token and contains it nowhere else: some
    models read their output at the end token.
    """
    embeddings: nn.Embedding = getattr(model, EMBEDDINGS)()
    vocabulary = embeddings.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    end = _end_token(model, vocabulary)
    if end is not None:
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    return ids.to(embeddings.weight.device)


def _end_token(model: nn.Module, vocabulary: int) -> int | None:
    """Return the id of an encoder-decoder model's end token, or None if the model has none within its vocabulary."""
    config = getattr(model, "config", None)
    end = getattr(config, "eos_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    return end if isinstance(end, int) and 0 <= end < vocabulary else None


def inputs_of(model: nn.Module, rows: int = ROWS, tokens: int = TOKENS) -> dict[str, Any]:
    """Return the arguments for a small call to a model, without a cache."""
    ids = token_ids(model, rows, tokens)
    inputs: dict[str, Any] = {"input_ids": ids}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if hasattr(config, "use_cache") or hasattr(getattr(config, "text_config", None), "use_cache"):
        inputs["use_cache"] = False
    return inputs


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients within a context, and restore it. Inference mode is not used: tensors
    that a model creates and caches in it cannot be used in training later.
    """
    with preserved(model), torch.no_grad():
        _set_mode(model, training=False)
        yield


def _set_mode(model: nn.Module, *, training: bool) -> None:
    """Put all modules in training or eval mode; in training mode, without the dropout that fused forwards implement."""
    for module in model.modules():
        module.__dict__["training"] = training  # torch's own attribute assignment is slow
        for name in DROPOUTS if training else ():
            if isinstance(module.__dict__.get(name), float):
                module.__dict__[name] = 0.0


DROPOUTS = ("p", "dropout", "attention_dropout")
"""Attributes that contain dropout probabilities; fused `forward` methods read them at each call."""


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode, inside `eval_mode` and without the dropout that fused forwards implement. Other
    randomness remains, so a module that depends on it differs from its fused `forward`.
    """
    with preserved(model):
        _set_mode(model, training=True)
        yield


THRESHOLDS = ("sliding_window", "original_max_position_embeddings", "attention_chunk_size")
"""Config fields from whose value in tokens on a module may compute something else."""

LONGEST = 600
"""Maximum number of tokens in a probe."""


def lengths_to_probe(model: nn.Module) -> tuple[int, ...]:
    """Return the lengths of additional probes, in tokens: short, longer, and beyond each threshold in the config.
    Thresholds of `LONGEST` tokens or more are not probed; a probe of a large model would take too long.
    """
    fields = getattr(getattr(model, "config", None), "__dict__", {})
    rope = fields.get("rope_parameters")
    values = [table.get(name) for table in (fields, rope) if isinstance(table, dict) for name in THRESHOLDS]
    beyond = {value + 1 for value in values if isinstance(value, int) and 0 < value < LONGEST}
    return (1, 33, *sorted(beyond - {1, 33}))


def some(ids: Tensor, ignored: int) -> Tensor:
    """Return labels (rows, tokens) for a probe with the given ids; every third token of the batch is labeled."""
    targets = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    return ids.masked_fill(targets % 3 != 1, ignored)


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two results (B, T, d), from a probe and from the unaccelerated model, are equal up to rounding."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return False
    error = torch.linalg.vector_norm(ours.double() - theirs.double())
    wanted = torch.linalg.vector_norm(theirs.double()).clamp_min(1e-30)
    return float(error / wanted) <= TOLERANCES.get(theirs.dtype, 0.0)


# ---- packing: what a model that keeps packed sequences apart can be given


def pack_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Pack all non-padding tokens of a batch, `attention_mask` 1 (rows, length), into one row without padding.

    Returns the arguments for the model (`input_ids` (1, tokens), positions and sequence boundaries), and the labels
    (1, tokens), without the first token of each sequence, which the last of another one must not predict.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(1)
    lengths = lengths[lengths > 0]
    boundaries = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    tokens, wanted = input_ids[kept][None], labels[kept].clone()[None]
    wanted[0, boundaries[:-1].long()] = IGNORED
    positions = torch.cat([torch.arange(int(n), device=input_ids.device) for n in lengths])[None]
    longest = int(lengths.max())
    where = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": tokens, "position_ids": positions, **where}, wanted


def keeps_sequences_apart(model: nn.Module, logits: Tensor | None = None) -> bool:
    """Return whether a causal model computes the same logits for two packed sequences as for each sequence alone.

    Must be called inside `eval_mode`. `logits` (rows, tokens, V) for `token_ids` must be those of the same forward
    methods: in bf16, the rounding errors of a deep model exceed the tolerance.
    """
    ids = token_ids(model)
    if logits is None:
        separate = attempt(lambda: model(input_ids=ids, use_cache=False).logits)
        logits = None if isinstance(separate, Exception) else separate
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        return False
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0  # the model is causal, so the logits of the remaining tokens do not change
    inputs, _ = pack_rows(ids, mask, ids)
    packed = attempt(lambda: model(**inputs, use_cache=False).logits[0])
    # an exception means that the model does not accept these arguments
    return not isinstance(packed, Exception) and agree(packed, logits[mask.bool()])
