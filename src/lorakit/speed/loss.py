"""Loss without full logits: the head returns its input, the hidden states, and the loss computes logits in chunks.

This requires that the model's logits are the output of its head, possibly scaled or soft-capped, which a probe checks;
otherwise, the loss is left unchanged. For existing training loops, the model's `loss_function` is replaced on the
instance, and two hooks are added: in a forward pass with labels in training mode, the output's logits are then None,
and so is the key-value cache unless it is requested. All other forward passes are unchanged.
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
from lorakit.ops.cross_entropy import IGNORED, linear_cross_entropy
from lorakit.ops.cross_entropy import Head as Operands
from lorakit.speed.last_layer import KEYWORD, LastLayer, Trained, agree, some
from lorakit.speed.patching import is_watched, may_run
from lorakit.speed.probe import Call, ModelOutput, attempt, inputs_of


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a transformers model, or None.

    Args:
        model: Any model.
    """
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without output embeddings raise various errors
        return None
    return head if isinstance(head, nn.Module) else None


@dataclass
class HiddenStateCapture:
    """State of a forward pass in which the head returns its input, the hidden states.

    Attributes:
        owner: The module that runs the forward pass, or None within `Head.passing`.
        given: Inputs to the head, (rows, length, d) each.
        version: In-place change counter of the last input when it was captured.
        used: Whether a loss was computed from the captured input.
    """

    owner: nn.Module | None
    given: list[Tensor] = field(default_factory=list)
    version: int = 0
    used: bool = False


@dataclass(eq=False)
class Head:
    """Output head of a model, for computing the loss without logits.

    Attributes:
        scale: Factor between the head's output and the logits.
        softcap: Bound that tanh puts on the logits, or None.
        module: The head's module, or that module's replacement once the model is accelerated.
        holders: Every (parent, attribute) that held the module when the model was accelerated.
        open: Thread -> state of its current capturing forward pass.
        last: The last layer if it can skip unlabeled rows, or None.
    """

    scale: float
    softcap: float | None
    module: nn.Module
    holders: tuple[tuple[nn.Module, str], ...] = ()
    open: dict[int, HiddenStateCapture] = field(default_factory=dict)
    last: LastLayer | None = None

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """Capture and return the hidden states (…, d) in a capturing forward pass; otherwise, return None.

        This is the fused forward that the head's replacement runs.
        """
        capture = self.open.get(threading.get_ident()) if self.open else None
        if capture is None or not args or kwargs:
            return None
        hidden: Tensor = args[0]
        capture.given.append(hidden)
        capture.version = 0 if hidden.is_inference() else hidden._version
        return hidden

    @contextlib.contextmanager
    def passing(self) -> Iterator[list[Tensor]]:
        """Capture this thread's hidden states within a context, in which the logits that models return are meaningless.

        Yields:
            Inputs to the head: hidden states, (rows, length, d).
        """
        thread = threading.get_ident()
        self.open[thread] = capture = HiddenStateCapture(None)
        try:
            yield capture.given
        finally:
            del self.open[thread]

    def applies(self) -> bool:
        """Return whether the head is unchanged since acceleration: still in place, frozen, plain and without hooks."""
        if any(parent._modules.get(name) is not self.module for parent, name in self.holders):
            return False  # it has an adapter now, or the model has another head
        weight, bias = self.module._parameters.get("weight"), self.module._parameters.get("bias")
        frozen = weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)
        return frozen and not is_watched(self.module) and may_run(self.module)

    def loss_sum(self, model: nn.Module, labels: Tensor, **inputs: Tensor | int | None) -> Tensor:
        """Compute the next-token cross-entropy, summed over all labeled tokens.

        Args:
            model: The accelerated model.
            labels: Labels (rows, length); -100 excludes a token from the loss, and any other label is predicted from
                the previous position.
            inputs: The model's other arguments.

        Returns:
            A scalar in fp32 or wider.
        """
        targets = shifted(labels, IGNORED)
        options = {} if self.last is None else self.last.keyword(targets, IGNORED, inputs)
        with self.passing() as given:
            model(**inputs, **options)
        (hidden,) = given
        return self.loss(hidden, targets, 1.0, IGNORED)

    def loss(self, hidden: Tensor, targets: Tensor, total: float | Tensor | None, ignore_index: int) -> Tensor:
        """Compute the cross-entropy of shifted targets.

        Args:
            hidden: Input to the head, (…, d).
            targets: One label per hidden state, of any shape (…).
            total: Divisor of the summed loss; None for the number of targets that are not ignored.
            ignore_index: Label of tokens that do not contribute to the loss.

        Returns:
            A scalar in fp32 or wider.
        """
        weight, bias = self.module.get_parameter("weight"), self.module._parameters.get("bias")
        operands = Operands(weight, bias, self.scale, self.softcap)
        flat = targets.reshape(-1)
        rows = hidden.reshape(len(flat), -1)
        return linear_cross_entropy(rows, operands, flat, total=total, ignore_index=ignore_index)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits (…, V) for hidden states (…, d), calling the head as a module."""
        logits: Tensor = self.module(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shifted(labels: Tensor, ignored: int) -> Tensor:
    """Shift labels (…, length) to the positions that predict them; the last position gets `ignored`."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)


def last_layer_for(head: Head, last: LastLayer, call: Call, output: ModelOutput | None) -> LastLayer | None:
    """Return the last layer if a probe shows that it can skip unlabeled rows, else None.

    Must be called inside `eval_mode`.

    Args:
        head: The head of a model with all replacements in place.
        last: The last layer to check.
        call: The call to the head in a probe of the plain model.
        output: The plain model's output in that probe.
    """
    if not isinstance(output, Mapping):
        return None
    made = {**vars(output), **output} if hasattr(output, "__dict__") else output
    if any(made[name] is not None for name in made if name != "logits"):
        return None  # something else may read the layer's output
    inputs = inputs_of(last.model)
    options = last.keyword(some(inputs["input_ids"], IGNORED), IGNORED, inputs)
    with head.passing() as given:
        ran = attempt(lambda: last.model(**inputs, **options))
    if isinstance(ran, Exception):  # the model does not forward the keyword argument
        return None
    if not options or len(given) != 1 or given[0].shape != call.args[0].shape:
        return None
    ours, theirs = given[0].flatten(0, -2), call.args[0].flatten(0, -2)
    rows = options[KEYWORD].rows
    others = torch.ones(len(ours), dtype=torch.bool, device=rows.device).index_fill_(0, rows, value=False)
    arrives = not agree(ours[others], theirs[others])
    return last if arrives and agree(ours[rows], theirs[rows]) else None


def head_for(head: nn.Module | None, given: Tensor | None, logits: Tensor | None, model: nn.Module) -> Head | str:
    """Determine how a model's logits depend on its head's output.

    Args:
        head: The model's output embeddings.
        given: The head's output in a probe, (rows, tokens, V), or None if it was not called.
        logits: The model's logits, (rows, tokens, V).
        model: The model.

    Returns:
        The head, or a short phrase that says why computing the loss requires logits.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "its loss is not the next-token loss"
    if head is None or type(head).forward is not nn.Linear.forward or is_watched(head):
        return "its head is not a plain linear module"
    if head.weight.requires_grad:
        return "its head is trained"
    if given is None or not isinstance(logits, Tensor) or given.shape != logits.shape:
        return "its logits are not the output of its head"
    found, wanted = given.double(), logits.double()
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        found = softcap * torch.tanh(found / softcap)
    scale = float((found * wanted).sum() / (found * found).sum().clamp_min(1e-30))
    if not agree(scale * found, logits):
        return "its logits are not a function of its head's output alone"
    if torch.equal(given, logits) or abs(scale - 1) < 1e-6 or (softcap is not None and abs(scale - 1) < 1e-2):
        scale = 1.0
    elif softcap is not None:
        return "its logits are both scaled and soft-capped"
    return Head(scale, softcap, head)


STOCK = ("transformers.loss.loss_utils", "ForCausalLMLoss")
"""Module and qualified name of the loss function that is reproduced here."""

LOSS, OWN_LOSS = "loss_function", "_loss_function"
"""Attributes of a transformers model: its loss function, and the one set on the model itself, if any."""

Loss = Callable[..., Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LossWithoutLogits:
    """Replacement for one model's loss function.

    Args:
        head: The model's head.
        model: The transformers model whose loss function is replaced.
        last: The model's last layer if it can skip unlabeled rows, or None.
    """

    def __init__(self, head: Head, model: nn.Module, last: LastLayer | None) -> None:
        self.head = head
        self.model = model
        self.stock: Loss = getattr(model, LOSS)
        self.own: Loss | None = vars(model).get(OWN_LOSS)
        self.last = last
        self.handles: list[RemovableHandle] = []

    def install(self, wholes: Iterable[nn.Module]) -> None:
        """Set the model's loss function, and add the hooks to the model and its wrappers, `wholes`."""
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

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Compute the next-token loss, a scalar; the parameters are those of transformers' own loss.

        Args:
            logits: Logits (rows, length, V), or the hidden states in a capturing forward pass.
            labels: Labels (rows, length).
            vocab_size: Vocabulary size V.
            num_items_in_batch: Divisor of the summed loss; None for the number of labeled tokens.
            ignore_index: Label of tokens that do not contribute to the loss.
            shift_labels: Labels already aligned with the positions that predict them, (rows, length), to use instead
                of `labels`.
            kwargs: Other arguments of transformers' own loss.

        Raises:
            RunError: The head was called more than once, or its output was changed in place.
        """
        options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
        is_traced = torch.compiler.is_compiling()  # a compiler cannot trace thread ids, so it gets logits
        capture = None if is_traced else self.head.open.get(threading.get_ident())
        if capture is None or capture.owner is None or not capture.given:
            return self.stock(logits, labels, vocab_size, **options, **kwargs)
        hidden = capture.given[0]
        is_changed = not hidden.is_inference() and hidden._version != capture.version
        if len(capture.given) != 1 or is_changed:
            raise RunError(
                f"{type(self.model).__name__} called its head {len(capture.given)} times or changed its output "
                "in place, so the loss cannot be computed without logits; call accelerate(model) without logits=False",
                what=type(self.model).__name__,
            )
        capture.used = True
        weight = self.head.module._parameters["weight"]
        if type(weight) is not nn.Parameter or vocab_size != len(weight) or 0 <= ignore_index < vocab_size:
            del self.head.open[threading.get_ident()]  # a sharded head gathers its weight when it is called
            try:
                made = self.head.logits(hidden)
            finally:
                self.head.open[threading.get_ident()] = capture
            return self.stock(made, labels, vocab_size, **options, **kwargs)
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
            self.head.open.pop(thread, None)  # an interrupted forward pass may have left one behind
            return None
        if capture is None or capture.owner is module:
            self.head.open[thread] = HiddenStateCapture(module)
        if module is not self.model:
            return None  # wrappers may change the labels before they reach the model
        return args, kwargs | self._without_cache(args, kwargs) | self._trained_rows(kwargs)

    def _without_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, bool]:
        """Return the argument that disables the cache, or nothing if a call passes or requests a cache."""
        asked = any(kwargs.get(name) is not None for name in ("use_cache", "cache", "past_key_values"))
        by_name = len(args) < 2  # a second positional argument may be a cache
        return {"use_cache": False} if by_name and not asked and hasattr(self.model.config, "use_cache") else {}

    def _trained_rows(self, kwargs: Mapping[str, Any]) -> dict[str, Trained]:
        """Return the keyword argument for the last layer in a call to the model, or nothing."""
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
            raise RunError(f"{kind} passed labels to a loss other than its loss_function", what=kind)
        make: Callable[..., Mapping[str, Any]] = type(output)
        return make(**{name: value for name, value in output.items() if name != "logits"})


def loss_for(model: nn.Module, head: Head) -> LossWithoutLogits | str:
    """Return a model's loss without logits, not yet installed; or a short phrase that says why there is none.

    Must be called inside `eval_mode`.

    Args:
        model: The transformers model itself, without wrappers.
        head: The model's head.
    """
    stock: Loss | None = getattr(model, LOSS, None)
    if stock is None or (getattr(stock, "__module__", ""), getattr(stock, "__qualname__", "")) != STOCK:
        return "its loss function is not the next-token loss"
    asked: list[tuple[tuple[int, ...], int]] = []

    def listening(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: object) -> Tensor:
        asked.append((tuple(logits.shape), vocab_size))
        return stock(logits, labels, vocab_size, **kwargs)

    inputs = inputs_of(model)
    labels = some(inputs["input_ids"], IGNORED)
    options = {} if head.last is None else head.last.keyword(shifted(labels, IGNORED), IGNORED, inputs)
    own = vars(model).get(OWN_LOSS)
    setattr(model, LOSS, listening)
    try:
        ran = attempt(lambda: [model(**inputs, labels=labels, **more) for more in ([{}, options] if options else [{}])])
    finally:
        _set_own_loss(model, own)
    if isinstance(ran, Exception):
        return f"a probe of the loss raised {type(ran).__name__}"
    output, of_rows = ran[0], ran[1].loss if options else None
    if asked[:1] != [(tuple(output.logits.shape), output.logits.shape[-1])] or len(asked) != 1 + bool(options):
        return "its loss is not computed from its logits by its loss function"
    is_alone = of_rows is not None and agree(of_rows, output.loss)  # no other part of the loss reads the layer's output
    return LossWithoutLogits(head, model, head.last if is_alone else None)


def _set_own_loss(model: nn.Module, own: Loss | None) -> None:
    """Set the loss function stored on a model itself, or remove it if there was none."""
    if own is None:
        delattr(model, OWN_LOSS)
    else:
        setattr(model, OWN_LOSS, own)
