"""The loss without logits: a model's head hands its hidden states through, and the loss multiplies them in chunks.

Only where the model's logits are the head's output, perhaps scaled or bounded by tanh, as a probe shows; elsewhere the
loss stays the usual one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import is_watched
from lorakit.ops.cross_entropy import IGNORED, linear_cross_entropy
from lorakit.ops.cross_entropy import Head as Operands
from lorakit.speed.last_layer import KEYWORD, LastLayer, agree, some
from lorakit.speed.patching import may_run
from lorakit.speed.probe import TOLERANCES, Call, attempt, inputs_of


def output_head(model: Any) -> nn.Module | None:
    """What a transformers model calls its output embeddings, or None.

    Args:
        model: Any model.
    """
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without one differ in how they say so
        return None
    return head if isinstance(head, nn.Module) else None


@dataclass
class Passing:
    """A forward in which the head hands its hidden states through.

    Attributes:
        owner: The module whose forward it is, or None for a block.
        given: What the head got, (rows, length, d) each.
        version: How often the first of these had been changed in place when it was given.
        used: A loss was computed from it.
    """

    owner: nn.Module | None
    given: list[Tensor] = field(default_factory=list)
    version: int = 0
    used: bool = False


class Head:
    """The output head of a model, for a loss that needs no logits.

    Attributes:
        scale: Factor between the head's output and the logits.
        softcap: Bound of the logits by tanh, or None.
        module: What stands in the head's place.
        places: Every (parent, attribute) that held it when the model was accelerated.
        open: Thread -> the forward there in which the head multiplies nothing.
        last: The last layer, where that can do with the trained rows alone.
    """

    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...] = ()
    last: LastLayer | None = None

    def __init__(self, scale: float, softcap: float | None) -> None:
        self.scale = scale
        self.softcap = softcap
        self.open: dict[int, Passing] = {}

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """The head's stand-in: it keeps the hidden states (…, d) of a passing forward and gives them on, else None."""
        passing = self.open.get(threading.get_ident()) if self.open else None
        if passing is None or not args or kwargs:
            return None
        hidden: Tensor = args[0]
        passing.given.append(hidden)
        passing.version = 0 if hidden.is_inference() else hidden._version
        return hidden

    @contextlib.contextmanager
    def passing(self) -> Iterator[list[Tensor]]:
        """A block in which the head multiplies nothing in this thread; what forwards give for logits is meaningless.

        Yields:
            What the head gets: hidden states, (rows, length, d).
        """
        thread = threading.get_ident()
        self.open[thread] = passing = Passing(None)
        try:
            yield passing.given
        finally:
            del self.open[thread]

    def applies(self) -> bool:
        """Return whether the head is as it was when accelerated: in its place, frozen, plain and unwatched."""
        if any(parent._modules.get(name) is not self.module for parent, name in self.places):
            return False  # an adapter is around it, or the model has another one
        weight, bias = self.module._parameters.get("weight"), self.module._parameters.get("bias")
        frozen = weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)
        return frozen and not is_watched(self.module) and may_run(self.module)

    def loss_sum(self, model: nn.Module, labels: Tensor, **inputs: Any) -> Tensor:
        """Cross entropy of the next token, summed over the trained tokens.

        Args:
            model: The accelerated model.
            labels: (rows, length); -100 is not trained, the others from the position before them.
            inputs: The model's other arguments.

        Returns:
            A scalar in fp32 or wider.
        """
        targets = shifted(labels, IGNORED)
        words = {} if self.last is None else self.last.words(targets, IGNORED, inputs)
        with self.passing() as given:
            model(**inputs, **words)
        (hidden,) = given
        return self.loss(hidden, targets, 1.0, IGNORED)

    def loss(self, hidden: Tensor, targets: Tensor, total: Any, ignore_index: int) -> Tensor:
        """Cross entropy of targets that stand where they are predicted.

        Args:
            hidden: What the head got, (…, d).
            targets: As many labels as hidden states, of any shape (…).
            total: What the sum is divided by; None for the number of trained targets.
            ignore_index: The label that is not trained.

        Returns:
            A scalar in fp32 or wider.
        """
        weight: Any = self.module._parameters["weight"]
        operands = Operands(weight, self.module._parameters.get("bias"), self.scale, self.softcap)
        flat = targets.reshape(-1)
        return linear_cross_entropy(
            hidden.reshape(len(flat), -1), operands, flat, total=total, ignore_index=ignore_index
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model gives for logits of hidden states (…, d), (…, V); the head is called as a module."""
        logits: Tensor = self.module(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shifted(labels: Tensor, ignored: int) -> Tensor:
    """Labels (…, length) moved to where they are predicted; the last place has the one that is not trained."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)


def last_layer_for(model: Any, head: Head, last: LastLayer, call: Call, output: Any) -> LastLayer | None:
    """A last layer that may do with the trained rows alone, or None where a probe shows that it may not.

    The caller sees to `at_rest`.

    Args:
        model: The model, with all stand-ins in place.
        head: Its head.
        last: The layer in question.
        call: The head's call in a probe of the plain model.
        output: What that model returned.
    """
    if not isinstance(output, Mapping):
        return None
    made = {**vars(output), **output} if hasattr(output, "__dict__") else output
    if any(made[name] is not None for name in made if name != "logits"):
        return None  # something else may be made of what the layer gives
    inputs = inputs_of(model)
    words = last.words(some(inputs["input_ids"], IGNORED), IGNORED, inputs)
    with head.passing() as given:
        ran = attempt(lambda: model(**inputs, **words))
    if isinstance(ran, Exception):  # it does not hand such a word on
        return None
    if not words or len(given) != 1 or given[0].shape != call.args[0].shape:
        return None
    ours, theirs = given[0].flatten(0, -2), call.args[0].flatten(0, -2)
    rows = words[KEYWORD].rows
    others = torch.ones(len(ours), dtype=torch.bool, device=rows.device).index_fill_(0, rows, value=False)
    arrives = not agree(ours[others], theirs[others])
    return last if arrives and agree(ours[rows], theirs[rows]) else None


def head_for(head: nn.Module | None, given: Tensor | None, logits: Any, config: Any) -> Head | str:
    """What stands between a head and the logits of its model.

    Args:
        head: The model's output embeddings.
        given: The head's output in a probe, (rows, tokens, V), or None where it was not called.
        logits: The model's, (rows, tokens, V).
        config: The model's config.

    Returns:
        The head, or why its loss needs logits, as a phrase.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "its loss is not that of the next token"
    if head is None or type(head).forward is not nn.Linear.forward or is_watched(head):
        return "its head is no plain linear module"
    if head.weight.requires_grad:
        return "its head is trained"
    if given is None or not isinstance(logits, Tensor) or given.shape != logits.shape:
        return "its logits are not the output of its head"
    found, wanted = given.double(), logits.double()
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        found = softcap * torch.tanh(found / softcap)
    scale = float((found * wanted).sum() / (found * found).sum().clamp_min(1e-30))
    error = torch.linalg.vector_norm(scale * found - wanted) / torch.linalg.vector_norm(wanted).clamp_min(1e-30)
    if not float(error) <= TOLERANCES.get(logits.dtype, 0.0):
        return "its logits are more than the output of its head"
    if torch.equal(given, logits) or abs(scale - 1) < 1e-6 or (softcap is not None and abs(scale - 1) < 1e-2):
        scale = 1.0
    elif softcap is not None:
        return "its logits are bounded and scaled"
    return Head(scale, softcap)
