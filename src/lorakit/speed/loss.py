"""Loss without full logits: the head returns its input (the hidden states), and the loss computes logits in chunks.

A probe checks that the model's logits are the output of its head, possibly scaled or soft-capped. So that existing
training loops work without changes, the `loss_function` of the model instance is replaced, and two hooks are added. In
training mode, the output of a forward pass with labels then has no logits, and no key-value cache unless one was
requested. All other forward passes are unchanged.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.errors import RunError
from lorakit.identity.identities import is_plain_linear
from lorakit.ops.cross_entropy import IGNORED, label_losses, linear_cross_entropy
from lorakit.ops.cross_entropy import Head as Operands
from lorakit.speed.admission import Known
from lorakit.speed.last_layer import KEYWORD, LastLayer, Trained
from lorakit.speed.patching import Options, is_watched, may_run
from lorakit.speed.probe import ModelOutput, agree, attempt, inputs_of, some


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a transformers model, or None if it has none."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without output embeddings raise various errors
        return None
    return head if isinstance(head, nn.Module) else None


@dataclass
class HiddenStateCapture:
    """State of a forward pass in which the head captures and returns its input, the hidden states.

    Attributes:
        owner: The module that runs the forward pass, or None within `Head.passing`.
        given: The captured inputs to the head, (rows, length, d) each.
        version: Version counter of the last captured input, which in-place changes increment.
        used: Whether a loss was computed from the captured input.
    """

    owner: nn.Module | None
    given: list[Tensor] = field(default_factory=list)
    version: int = 0
    used: bool = False


@dataclass(eq=False)
class Head:
    """Output head of a model, for computing the loss without logits: softcap·tanh(scale·output/softcap).

    Attributes:
        module: The head's module; once the model is accelerated, the replacement for that module.
        holders: Every (parent, attribute) pair at which the model contained the module when it was accelerated.
        open: State of each thread's current capturing forward pass, by thread id.
        last: The last layer if it can skip unlabeled rows, otherwise None.
        holds: Returns whether the model and its loss function still compute what they did when accelerated.
    """

    scale: float
    softcap: float | None
    module: nn.Module
    holders: tuple[tuple[nn.Module, str], ...] = ()
    open: dict[int, HiddenStateCapture] = field(default_factory=dict)
    last: LastLayer | None = None
    holds: Callable[[], bool] = lambda: True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "holds"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, holds=lambda: False)  # copies of a model are not accelerated

    def accepts(self, options: Options) -> bool:
        """Return whether a call has no arguments besides the hidden states, and is part of a capturing forward pass."""
        return not options and threading.get_ident() in self.open

    def run(self, hidden: Tensor, options: Options) -> Tensor:
        """Capture and return the hidden states (…, d). This is the fused `forward` of the replaced head."""
        capture = self.open[threading.get_ident()]
        capture.given.append(hidden)
        capture.version = 0 if hidden.is_inference() else hidden._version
        return hidden

    @contextlib.contextmanager
    def passing(self) -> Iterator[list[Tensor]]:
        """Capture hidden states (rows, length, d) in the current thread, in a context where logits are meaningless."""
        thread = threading.get_ident()
        self.open[thread] = capture = HiddenStateCapture(None)
        try:
            yield capture.given
        finally:
            del self.open[thread]

    def applies(self) -> bool:
        """Return whether the head has not been replaced since acceleration, is frozen, and has no adapters or hooks."""
        if any(parent._modules.get(name) is not self.module for parent, name in self.holders):
            return False  # the head has an adapter now, or the model has a different head
        weight, bias = self.module._parameters.get("weight"), self.module._parameters.get("bias")
        frozen = weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)
        return frozen and not is_watched(self.module) and may_run(self.module) and self.holds()

    def loss_sum(self, model: nn.Module, labels: Tensor, **inputs: Tensor | int | None) -> Tensor:
        """Compute the next-token cross-entropy, a scalar in fp32 or wider, summed over labeled tokens. `labels`
        (rows, length) are -100 for a token without loss; `inputs` are the other arguments of the accelerated model.
        """
        hidden, targets = self._hidden(model, labels, inputs)
        return self.loss(hidden, targets, 1.0, IGNORED)

    def label_losses(self, model: nn.Module, labels: Tensor, **inputs: Tensor | int | None) -> Tensor:
        """Compute the losses (tokens,) of `loss_sum` for each labeled token, in order, without gradients."""
        hidden, targets = self._hidden(model, labels, inputs)
        flat = targets.reshape(-1)
        return label_losses(hidden.reshape(len(flat), -1), self._operands(), flat, IGNORED)

    def _hidden(
        self, model: nn.Module, labels: Tensor, inputs: Mapping[str, Tensor | int | None]
    ) -> tuple[Tensor, Tensor]:
        """Run a model; return the head's input (rows, length, d), and the targets (rows, length)."""
        targets = shifted(labels, IGNORED)
        options = {} if self.last is None else self.last.keyword(targets, IGNORED, inputs)
        with self.passing() as captured:
            model(**inputs, **options)
        (hidden,) = captured
        return hidden, targets

    def _operands(self) -> Operands:
        weight, bias = self.module.get_parameter("weight"), self.module._parameters.get("bias")
        return Operands(weight, bias, self.scale, self.softcap)

    def loss(self, hidden: Tensor, targets: Tensor, total: float | Tensor | None, ignore_index: int) -> Tensor:
        """Compute the cross-entropy, a scalar in fp32 or wider, of shifted targets (…) for inputs (…, d) to the head.
        `total` divides the sum; None is the number of targets other than `ignore_index`.
        """
        flat = targets.reshape(-1)
        rows = hidden.reshape(len(flat), -1)
        return linear_cross_entropy(rows, self._operands(), flat, total=total, ignore_index=ignore_index)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits (…, V) for hidden states (…, d). The head is called as a module."""
        logits: Tensor = self.module(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shifted(labels: Tensor, ignored: int) -> Tensor:
    """Shift labels (…, length) to the positions that predict them; the last position gets `ignored`."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)


def last_layer_for(head: Head, last: LastLayer, output: ModelOutput | None) -> LastLayer | None:
    """Return the last layer if a probe inside `eval_mode` shows that it can skip unlabeled rows; otherwise, None.
    `head` is of a model with all replacements in place, `output` of the unaccelerated model in a probe.
    """
    if not isinstance(output, Mapping):
        return None
    values = {**vars(output), **output} if hasattr(output, "__dict__") else output
    if any(values[name] is not None for name in values if name != "logits"):
        return None  # the model has other outputs, which may depend on the layer's output
    inputs = inputs_of(last.model)
    options = last.keyword(some(inputs["input_ids"], IGNORED), IGNORED, inputs)
    # of the same forward methods: in bf16, the rounding errors of a deep model exceed the tolerance
    ours, theirs = (_passed(head, last.model, {**inputs, **more}) for more in (options, {}))
    if not options or ours is None or theirs is None or ours.shape != theirs.shape:
        return None  # without `ours`, the model does not forward the keyword argument
    ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
    rows = options[KEYWORD].rows
    others = torch.ones(len(ours), dtype=torch.bool, device=rows.device).index_fill_(0, rows, value=False)
    arrives = not agree(ours[others], theirs[others])
    return last if arrives and agree(ours[rows], theirs[rows]) else None


def _passed(head: Head, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the input (…, d) that a model passes to its head, or None if it raises an exception."""
    with head.passing() as captured:
        ran = attempt(lambda: model(**inputs))
    return None if isinstance(ran, Exception) or len(captured) != 1 else captured[0]


def head_for(head: nn.Module | None, output: Tensor | None, logits: Tensor | None, model: nn.Module) -> Head | str:
    """Return the head from whose output, `output` (rows, tokens, V), logits can be computed, or why there is none."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "its loss is not the next-token loss"
    if head is None or not is_plain_linear(head) or is_watched(head):
        return "its head is not a plain linear module"
    if head.weight.requires_grad:
        return "its head is trainable"
    if output is None or not isinstance(logits, Tensor) or output.shape != logits.shape:
        return "its logits are not the output of its head"
    predicted, wanted = output.double(), logits.double()
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        predicted = softcap * torch.tanh(predicted / softcap)
    scale = float((predicted * wanted).sum() / (predicted * predicted).sum().clamp_min(1e-30))
    if not agree(scale * predicted, logits):
        return "its logits are not a function of its head's output alone"
    if torch.equal(output, logits) or abs(scale - 1) < 1e-6 or (softcap is not None and abs(scale - 1) < 1e-2):
        scale = 1.0
    elif softcap is not None:
        return "its logits are both scaled and soft-capped"
    return Head(scale, softcap, head)


STOCK = "ForCausalLMLoss"
"""Name of the transformers loss function that this module reproduces."""

TABLE = "LOSS_MAPPING"
"""Global variable of transformers that maps the names of loss types to loss functions."""

LOSS, OWN_LOSS = "loss_function", "_loss_function"
"""Attributes of a transformers model: its loss function, and the loss function set on the instance, if there is one."""

Loss = Callable[..., Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LossWithoutLogits:
    """Replacement for one model's loss function, with the last layer if it can skip unlabeled rows."""

    def __init__(self, head: Head, model: nn.Module, last: LastLayer | None) -> None:
        self.head = head
        self.model = model
        self.found: Loss = getattr(model, LOSS)
        self.own: Loss | None = vars(model).get(OWN_LOSS)
        self.table, self.name = entry_of(self.found)
        self.last = last
        self.handles: list[RemovableHandle] = []

    @property
    def stock(self) -> Loss:
        """Return the loss function that the model would use now."""
        is_looked_up = self.own is None and self.name is not None
        return self.table.get(str(self.name), self.found) if is_looked_up else self.found

    def install(self, wholes: Iterable[nn.Module]) -> None:
        """Replace the model's loss function, and add the hooks to `wholes`, which are the model and its wrappers."""
        setattr(self.model, LOSS, self)
        for whole in wholes:
            self.handles.append(whole.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(whole.register_forward_hook(self._end, always_call=True))

    def undo(self) -> None:
        """Remove the hooks and restore the model's own loss function."""
        for handle in self.handles:
            handle.remove()
        if vars(self.model).get(OWN_LOSS) is self:
            _set_own_loss(self.model, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the next-token loss as a scalar, with the arguments of the model's own loss function; see `_loss`.

        Raises:
            RunError: The head was called more than once, or its output was modified in place.
        """
        is_traced = torch.compiler.is_compiling()  # compilers cannot trace thread ids; use the stock loss
        capture = None if is_traced else self.head.open.get(threading.get_ident())
        if capture is None or capture.owner is None or not capture.given:
            return self.stock(*args, **kwargs)
        return self._loss(capture, *args, **kwargs)

    def _loss(
        self,
        capture: HiddenStateCapture,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Compute the loss from captured hidden states.

        Args:
            capture: The capturing forward pass.
            logits: The captured hidden states; the model takes them for its logits.
            labels: Labels (rows, length).
            vocab_size: Vocabulary size V.
            num_items_in_batch: Divisor of the summed loss; None divides by the number of labeled tokens.
            ignore_index: Label of tokens that do not contribute to the loss.
            shift_labels: Labels (rows, length) that are already aligned with the positions that predict them; they
                replace `labels`.
            kwargs: Other arguments of transformers' loss function.
        """
        options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
        hidden = capture.given[0]
        is_changed = not hidden.is_inference() and hidden._version != capture.version
        if len(capture.given) != 1 or is_changed:
            raise RunError(
                f"{type(self.model).__name__} called its head more than once or modified the head's output in place "
                f"(calls: {len(capture.given)}), so the loss cannot be computed without logits; call accelerate(model) "
                "without logits=False",
                what=type(self.model).__name__,
            )
        capture.used = True
        weight = self.head.module._parameters["weight"]
        if type(weight) is not nn.Parameter or vocab_size != len(weight) or 0 <= ignore_index < vocab_size:
            del self.head.open[threading.get_ident()]  # a sharded head gathers its weight only when it is called
            try:
                logits_of_hidden = self.head.logits(hidden)
            finally:
                self.head.open[threading.get_ident()] = capture
            return self.stock(logits_of_hidden, labels, vocab_size, **options, **kwargs)
        if shift_labels is None:
            assert labels is not None
            shift_labels = shifted(labels, ignore_index)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        return self.head.loss(hidden, shift_labels, num_items_in_batch, ignore_index)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if torch.compiler.is_compiling():
            return None
        thread, wanted = threading.get_ident(), self._wanted(module, kwargs)
        capture = self.head.open.get(thread)
        if capture is not None and capture.owner is None:
            return None  # within `Head.passing`
        if not wanted:
            self.head.open.pop(thread, None)  # an interrupted forward pass may have left a capture behind
            return None
        if capture is None or capture.owner is module:
            self.head.open[thread] = HiddenStateCapture(module)
        if module is not self.model:
            return None  # wrappers may change the labels before they reach the model
        return args, kwargs | self._without_cache(args, kwargs) | self._trained_rows(kwargs)

    def _without_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, bool]:
        """Return a dict with the argument that disables the cache; empty if the call passes or requests a cache."""
        is_requested = any(kwargs.get(name) is not None for name in ("use_cache", "cache", "past_key_values"))
        by_name = len(args) < 2  # a second positional argument may be a cache
        return {"use_cache": False} if by_name and not is_requested and hasattr(self.model.config, "use_cache") else {}

    def _trained_rows(self, kwargs: Mapping[str, Any]) -> dict[str, Trained]:
        """Return a dict with the keyword argument that lets the last layer skip unlabeled rows, or an empty dict."""
        ignored, targets = kwargs.get("ignore_index", IGNORED), kwargs.get("shift_labels")
        if self.last is None or type(ignored) is not int:
            return {}
        if targets is None:
            targets = shifted(kwargs["labels"], ignored)
        return self.last.keyword(targets, ignored, kwargs)

    def _wanted(self, module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
        by_name = kwargs.get("return_dict")
        by_name = getattr(self.model.config, "return_dict", True) if by_name is None else by_name
        labels = kwargs.get("labels")
        has_labels = isinstance(labels, Tensor) and labels.numel() > 0
        return has_labels and bool(by_name) and module.training and self.head.applies()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> Mapping[str, Any] | None:
        if torch.compiler.is_compiling():
            return None
        thread = threading.get_ident()
        capture = self.head.open.get(thread)
        if capture is None or capture.owner is not module:
            return None
        del self.head.open[thread]
        if not capture.given or not isinstance(output, Mapping):  # a failed forward pass has no output
            return None
        if not capture.used:
            kind = type(self.model).__name__
            raise RunError(f"{kind} computed its loss without calling its loss_function", what=kind)
        make: Callable[..., Mapping[str, Any]] = type(output)
        return make(**{name: value for name, value in output.items() if name != "logits"})


def entry_of(function: Loss) -> tuple[dict[str, Loss], str | None]:
    """Return the table in which transformers looks up a loss function, and its name there, or None."""
    table: dict[str, Loss] = getattr(function, "__globals__", {}).get(TABLE, {})
    return table, next((name for name, value in table.items() if value is function), None)


def loss_for(model: nn.Module, head: Head, known: Known) -> LossWithoutLogits | str:
    """Return a `LossWithoutLogits` that is not yet installed, or a short reason why the loss requires logits. Must be
    called inside `eval_mode` with a transformers model without wrappers.
    """
    stock: Loss | None = getattr(model, LOSS, None)
    if stock is None or getattr(stock, "__name__", "") != STOCK:
        return "its loss function is not the next-token loss"
    if reason := known.why_not_loss(stock):
        return reason
    calls: list[tuple[tuple[int, ...], int]] = []

    def listening(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: object) -> Tensor:
        calls.append((tuple(logits.shape), vocab_size))
        return stock(logits, labels, vocab_size, **kwargs)

    inputs = inputs_of(model)
    labels = some(inputs["input_ids"], IGNORED)
    options = {} if head.last is None else head.last.keyword(shifted(labels, IGNORED), IGNORED, inputs)
    own_loss = vars(model).get(OWN_LOSS)
    setattr(model, LOSS, listening)
    try:
        ran = attempt(lambda: [model(**inputs, labels=labels, **more) for more in ([{}, options] if options else [{}])])
    finally:
        _set_own_loss(model, own_loss)
    if isinstance(ran, Exception):
        return f"a probe of the loss raised {type(ran).__name__}"
    output, of_rows = ran[0], ran[1].loss if options else None
    if calls[:1] != [(tuple(output.logits.shape), output.logits.shape[-1])] or len(calls) != 1 + bool(options):
        return "its loss is not computed from its logits by its loss function"
    is_alone = of_rows is not None and agree(of_rows, output.loss)  # whether nothing else reads the layer's output
    return LossWithoutLogits(head, model, head.last if is_alone else None)


def _set_own_loss(model: nn.Module, own: Loss | None) -> None:
    """Set the loss function stored on a model instance, or remove it if `own` is None."""
    if own is None:
        delattr(model, OWN_LOSS)
    else:
        setattr(model, OWN_LOSS, own)
