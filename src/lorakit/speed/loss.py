"""Loss without logits for existing training loops: replaces a model's `loss_function` on the instance, with two hooks.

In a forward with labels in training mode, the head returns its hidden states, and the loss multiplies them in chunks;
the output's logits are then None, and so is the key-value cache unless requested. All other forwards are unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.ops.cross_entropy import IGNORED
from lorakit.speed.last_layer import LastLayer, Trained, agree, some
from lorakit.speed.output_head import Head, HiddenStateCapture, shifted
from lorakit.speed.probe import attempt, inputs_of

STOCK = ("transformers.loss.loss_utils", "ForCausalLMLoss")
"""Module and name of the loss whose arithmetic is known."""


class LossWithoutLogits:
    """Replacement for one model's loss function.

    Args:
        head: The model's head.
        model: The transformers model whose loss function this is.
        last: Its last layer, if that can skip rows without loss, or None.
    """

    def __init__(self, head: Head, model: Any, last: LastLayer | None) -> None:
        self.head = head
        self.model = model
        self.stock: Callable[..., Tensor] = model.loss_function
        self.own: Any = model.__dict__.get("_loss_function")  # the loss function set on the model itself, or None
        self.last = last
        self.handles: list[RemovableHandle] = []

    def install(self, wholes: Iterable[nn.Module]) -> None:
        """Set the loss function and add the hooks to every callable owner: the model, and its wrappers."""
        self.model.loss_function = self
        for whole in wholes:
            self.handles.append(whole.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(whole.register_forward_hook(self._end, always_call=True))

    def undo(self) -> None:
        """Remove the hooks and restore the model's own loss function."""
        for handle in self.handles:
            handle.remove()
        if self.model.__dict__.get("_loss_function") is self:
            _set_own_loss(self.model, self.own)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the next-token loss, a scalar, with the arguments of transformers' own.

        Args:
            logits: (rows, length, V), or the hidden states in a capturing forward.
            labels: (rows, length).
            vocab_size: V.
            num_items_in_batch: Divisor of the summed loss; None for the number of labels.
            ignore_index: The label without loss.
            shift_labels: Labels already aligned with the positions that predict them, (rows, length), instead of
                `labels`.
            kwargs: Other arguments of the stock loss.

        Raises:
            RuntimeError: The head was called several times, or its output was changed in place.
        """
        options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
        capture = None
        if not torch.compiler.is_compiling():  # a compiler cannot trace threads, and gets logits
            capture = self.head.open.get(threading.get_ident())
        if capture is None or capture.owner is None or not capture.given:
            return self.stock(logits, labels, vocab_size, **options, **kwargs)
        if len(capture.given) != 1 or capture.given[0]._version != capture.version:
            raise RuntimeError(
                f"{type(self.model).__name__} called its head {len(capture.given)} times or changed its output "
                "in place, so the loss cannot be computed without logits; use accelerate(model) without logits=False"
            )
        hidden = capture.given[0]
        capture.used = True
        weight: Any = self.head.module._parameters["weight"]
        if type(weight) is not nn.Parameter or vocab_size != len(weight) or 0 <= ignore_index < vocab_size:
            del self.head.open[threading.get_ident()]  # a sharded head gathers its weight when called
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

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return None
        thread, wanted = threading.get_ident(), self._wanted(module, kwargs)
        capture = self.head.open.get(thread)
        if capture is not None and capture.owner is None:
            return None  # a block of our own loop
        if not wanted:
            self.head.open.pop(thread, None)  # left behind by an interrupt
            return None
        if capture is None or capture.owner is module:
            self.head.open[thread] = HiddenStateCapture(module)
        if module is not self.model:
            return None  # wrappers may change the labels before they reach the model
        return args, kwargs | self._without_cache(args, kwargs) | self._trained_rows(kwargs)

    def _without_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, bool]:
        """Return an argument that disables the cache, for a call without one that requests none: the loss does not read
        it.
        """
        asked = any(kwargs.get(name) is not None for name in ("use_cache", "cache", "past_key_values"))
        by_name = len(args) < 2  # a second positional argument may be a cache
        return {"use_cache": False} if by_name and not asked and hasattr(self.model.config, "use_cache") else {}

    def _trained_rows(self, kwargs: Mapping[str, Any]) -> dict[str, Trained]:
        """Return the keyword argument for the last layer in a call of the model, or nothing."""
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

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        thread = threading.get_ident()
        capture = self.head.open.get(thread)
        if capture is None or capture.owner is not module:
            return None
        del self.head.open[thread]
        if not capture.given or not isinstance(output, Mapping):  # a failed forward gives nothing
            return None
        if not capture.used:
            raise RuntimeError(f"{type(self.model).__name__} passed labels to a loss other than its loss_function")
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def loss_for(model: Any, head: Head) -> LossWithoutLogits | str:
    """Return the loss without logits of a model, not yet installed; or why it is not possible, a short phrase.

    Call it in `eval_mode`.

    Args:
        model: The transformers model itself, without wrappers.
        head: Its head.
    """
    stock: Any = getattr(model, "loss_function", None)
    if (getattr(stock, "__module__", ""), getattr(stock, "__qualname__", "")) != STOCK:
        return "its loss function is not the next-token loss"
    asked: list[tuple[tuple[int, ...], int]] = []

    def listening(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        asked.append((tuple(logits.shape), vocab_size))
        made: Tensor = stock(logits, labels, vocab_size, **kwargs)
        return made

    inputs = inputs_of(model)
    labels = some(inputs["input_ids"], IGNORED)
    options = {} if head.last is None else head.last.keyword(shifted(labels, IGNORED), IGNORED, inputs)
    own = model.__dict__.get("_loss_function")
    model.loss_function = listening
    try:
        ran = attempt(lambda: [model(**inputs, labels=labels, **more) for more in ([{}, options] if options else [{}])])
    finally:
        _set_own_loss(model, own)
    if isinstance(ran, Exception):
        return f"a probe of it raised {type(ran).__name__}"
    output, of_rows = ran[0], ran[1].loss if options else None
    if asked[:1] != [(tuple(output.logits.shape), output.logits.shape[-1])] or len(asked) != 1 + bool(options):
        return "it does not compute its loss from its logits with its loss function"
    is_alone = of_rows is not None and agree(of_rows, output.loss)  # no other part of the loss reads the layer's output
    return LossWithoutLogits(head, model, head.last if is_alone else None)


def _set_own_loss(model: Any, own: Any) -> None:
    """Set the loss function stored on a model itself, or remove it if there was none."""
    if own is None:
        del model._loss_function
    else:
        model._loss_function = own
