"""The loss of other people's loops without logits: a model's own `loss_function`, set on the instance, and two hooks.

In a forward with labels, in training mode, the head hands its hidden states through, and the loss multiplies them in
chunks; the output's logits are then None, and so is the key-value cache that nobody asked for. Every other forward is
as it was.
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
from lorakit.speed.output_head import Head, Passing, shifted
from lorakit.speed.probe import attempt, inputs_of

STOCK = ("transformers.loss.loss_utils", "ForCausalLMLoss")
"""Module and name of the loss whose arithmetic is known."""


class LossWithoutLogits:
    """Stands in for one model's loss function.

    Args:
        head: The model's head.
        model: The transformers model whose loss function this is.
        last: Its last layer, where that can do with the trained rows alone, or None.
    """

    def __init__(self, head: Head, model: Any, last: LastLayer | None) -> None:
        self.head = head
        self.model = model
        self.stock: Callable[..., Tensor] = model.loss_function
        self.own: Any = model.__dict__.get("_loss_function")  # what was set on the model itself, or None
        self.last = last
        self.handles: list[RemovableHandle] = []

    def install(self, wholes: Iterable[nn.Module]) -> None:
        """Set the loss function and hang the hooks on what may be called: the model, and what wraps it."""
        self.model.loss_function = self
        for whole in wholes:
            self.handles.append(whole.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(whole.register_forward_hook(self._end, always_call=True))

    def undo(self) -> None:
        """Take the hooks away and give the model its own loss function back."""
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
        """The loss of the next token, a scalar, with the arguments of transformers' own.

        Args:
            logits: (rows, length, V), or the hidden states in a passing forward.
            labels: (rows, length).
            vocab_size: V.
            num_items_in_batch: What the sum is divided by; None for the trained labels.
            ignore_index: The label that is not trained.
            shift_labels: Labels that stand where they are predicted, (rows, length), instead of `labels`.
            kwargs: What the stock loss takes besides.

        Raises:
            RuntimeError: The head was called several times, or what it gave was changed in place.
        """
        words = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
        passing = None
        if not torch.compiler.is_compiling():  # it cannot trace threads, and gets logits
            passing = self.head.open.get(threading.get_ident())
        if passing is None or passing.owner is None or not passing.given:
            return self.stock(logits, labels, vocab_size, **words, **kwargs)
        if len(passing.given) != 1 or passing.given[0]._version != passing.version:
            raise RuntimeError(
                f"{type(self.model).__name__} called its head {len(passing.given)} times or changed what it gave, so "
                "its loss cannot be computed without logits: leave accelerate(model, logits=False) away."
            )
        hidden = passing.given[0]
        passing.used = True
        weight: Any = self.head.module._parameters["weight"]
        if type(weight) is not nn.Parameter or vocab_size != len(weight) or 0 <= ignore_index < vocab_size:
            del self.head.open[threading.get_ident()]  # a head that is sharded by itself gathers its weight when called
            try:
                made = self.head.logits(hidden)
            finally:
                self.head.open[threading.get_ident()] = passing
            return self.stock(made, labels, vocab_size, **words, **kwargs)
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
        passing = self.head.open.get(thread)
        if passing is not None and passing.owner is None:
            return None  # a block of our own loop
        if not wanted:
            self.head.open.pop(thread, None)  # one that an interrupt left
            return None
        if passing is None or passing.owner is module:
            self.head.open[thread] = Passing(module)
        if module is not self.model:
            return None  # what wraps the model may change the labels before they come to it
        return args, kwargs | self._without_cache(args, kwargs) | self._trained_rows(kwargs)

    def _without_cache(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, bool]:
        """A word against a cache, for a call that has none and asks for none: the loss does not read it."""
        asked = any(kwargs.get(name) is not None for name in ("use_cache", "cache", "past_key_values"))
        by_name = len(args) < 2  # another one than the tokens may be a cache
        return {"use_cache": False} if by_name and not asked and hasattr(self.model.config, "use_cache") else {}

    def _trained_rows(self, kwargs: Mapping[str, Any]) -> dict[str, Trained]:
        """The word for the last layer, of a call of the model, or nothing."""
        ignored, targets = kwargs.get("ignore_index", IGNORED), kwargs.get("shift_labels")
        if self.last is None or type(ignored) is not int:
            return {}
        if targets is None:
            targets = shifted(kwargs["labels"], ignored)
        return self.last.words(targets, ignored, kwargs)

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
        passing = self.head.open.get(thread)
        if passing is None or passing.owner is not module:
            return None
        del self.head.open[thread]
        if not passing.given or not isinstance(output, Mapping):  # a forward that failed gave nothing
            return None
        if not passing.used:
            raise RuntimeError(f"{type(self.model).__name__} gave labels to a loss that is not its loss_function.")
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def loss_for(model: Any, head: Head) -> LossWithoutLogits | str:
    """What computes a model's loss without logits, not yet installed; or why that cannot be, as a phrase.

    The caller sees to `at_rest`.

    Args:
        model: The transformers model itself, without what wraps it.
        head: Its head.
    """
    stock: Any = getattr(model, "loss_function", None)
    if (getattr(stock, "__module__", ""), getattr(stock, "__qualname__", "")) != STOCK:
        return "its loss function is not that of the next token"
    asked: list[tuple[tuple[int, ...], int]] = []

    def listening(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        asked.append((tuple(logits.shape), vocab_size))
        made: Tensor = stock(logits, labels, vocab_size, **kwargs)
        return made

    inputs = inputs_of(model)
    labels = some(inputs["input_ids"], IGNORED)
    words = {} if head.last is None else head.last.words(shifted(labels, IGNORED), IGNORED, inputs)
    own = model.__dict__.get("_loss_function")
    model.loss_function = listening
    try:
        ran = attempt(lambda: [model(**inputs, labels=labels, **more) for more in ([{}, words] if words else [{}])])
    finally:
        _set_own_loss(model, own)
    if isinstance(ran, Exception):
        return f"a probe of it raised {type(ran).__name__}"
    output, of_rows = ran[0], ran[1].loss if words else None
    if asked[:1] != [(tuple(output.logits.shape), output.logits.shape[-1])] or len(asked) != 1 + bool(words):
        return "it does not compute its loss from its logits by its loss function"
    is_alone = of_rows is not None and agree(
        of_rows, output.loss
    )  # no other part of the loss reads what the layer gave
    return LossWithoutLogits(head, model, head.last if is_alone else None)


def _set_own_loss(model: Any, own: Any) -> None:
    """Set the loss function that a model itself holds, or remove it if there was none."""
    if own is None:
        del model._loss_function
    else:
        model._loss_function = own
