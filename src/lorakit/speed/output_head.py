"""Loss without logits: a model's head returns its hidden states, and the loss multiplies them in chunks.

Only if the model's logits are the head's output, possibly scaled or soft-capped, as a probe shows; otherwise the loss
is unchanged.
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
    """Return the output embeddings of a transformers model, or None.

    Args:
        model: Any model.
    """
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without one raise different errors
        return None
    return head if isinstance(head, nn.Module) else None


@dataclass
class HiddenStateCapture:
    """A forward in which the head returns its hidden states.

    Attributes:
        owner: The module whose forward it is, or None for a context.
        given: Inputs of the head, (rows, length, d) each.
        version: In-place change counter of the first of these when it was captured.
        used: Whether a loss was computed from it.
    """

    owner: nn.Module | None
    given: list[Tensor] = field(default_factory=list)
    version: int = 0
    used: bool = False


class Head:
    """Output head of a model, for a loss without logits.

    Attributes:
        scale: Factor between the head's output and the logits.
        softcap: Bound of the logits by tanh, or None.
        module: Replacement of the head.
        places: Every (parent, attribute) that held it when the model was accelerated.
        open: Thread -> its current capturing forward.
        last: The last layer, if that can skip rows without loss.
    """

    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...] = ()
    last: LastLayer | None = None

    def __init__(self, scale: float, softcap: float | None) -> None:
        self.scale = scale
        self.softcap = softcap
        self.open: dict[int, HiddenStateCapture] = {}

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """Run as the head's replacement: capture and return the hidden states (…, d) of a capturing forward, else
        return None.
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
        """Capture hidden states within a context, for this thread; the logits that forwards return are meaningless.

        Yields:
            Inputs of the head: hidden states, (rows, length, d).
        """
        thread = threading.get_ident()
        self.open[thread] = capture = HiddenStateCapture(None)
        try:
            yield capture.given
        finally:
            del self.open[thread]

    def applies(self) -> bool:
        """Return whether the head is unchanged since it was accelerated: in place, frozen, plain and without hooks."""
        if any(parent._modules.get(name) is not self.module for parent, name in self.places):
            return False  # it has an adapter now, or the model has another head
        weight, bias = self.module._parameters.get("weight"), self.module._parameters.get("bias")
        frozen = weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)
        return frozen and not is_watched(self.module) and may_run(self.module)

    def loss_sum(self, model: nn.Module, labels: Tensor, **inputs: Any) -> Tensor:
        """Compute the next-token cross-entropy, summed over the tokens with loss.

        Args:
            model: The accelerated model.
            labels: (rows, length); -100 has no loss, the others are predicted from the previous position.
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

    def loss(self, hidden: Tensor, targets: Tensor, total: Any, ignore_index: int) -> Tensor:
        """Compute the cross-entropy of shifted targets.

        Args:
            hidden: Input of the head, (…, d).
            targets: One label per hidden state, of any shape (…).
            total: Divisor of the summed loss; None for the number of targets with loss.
            ignore_index: The label without loss.

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
        """Return the model's logits (…, V) for hidden states (…, d); calls the head as a module."""
        logits: Tensor = self.module(hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shifted(labels: Tensor, ignored: int) -> Tensor:
    """Shift labels (…, length) to the positions that predict them; the last position gets the label without loss."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)


def last_layer_for(model: Any, head: Head, last: LastLayer, call: Call, output: Any) -> LastLayer | None:
    """Return the last layer if it can skip rows without loss, or None if a probe shows that it cannot; call it in
    `eval_mode`.

    Args:
        model: The model, with all replacements in place.
        head: Its head.
        last: The layer in question.
        call: The head's call in a probe of the plain model.
        output: The output of that model.
    """
    if not isinstance(output, Mapping):
        return None
    made = {**vars(output), **output} if hasattr(output, "__dict__") else output
    if any(made[name] is not None for name in made if name != "logits"):
        return None  # something else may read the layer's output
    inputs = inputs_of(model)
    options = last.keyword(some(inputs["input_ids"], IGNORED), IGNORED, inputs)
    with head.passing() as given:
        ran = attempt(lambda: model(**inputs, **options))
    if isinstance(ran, Exception):  # the model does not forward the keyword argument
        return None
    if not options or len(given) != 1 or given[0].shape != call.args[0].shape:
        return None
    ours, theirs = given[0].flatten(0, -2), call.args[0].flatten(0, -2)
    rows = options[KEYWORD].rows
    others = torch.ones(len(ours), dtype=torch.bool, device=rows.device).index_fill_(0, rows, value=False)
    arrives = not agree(ours[others], theirs[others])
    return last if arrives and agree(ours[rows], theirs[rows]) else None


def head_for(head: nn.Module | None, given: Tensor | None, logits: Any, config: Any) -> Head | str:
    """Determine how the logits of a model depend on its head.

    Args:
        head: The model's output embeddings.
        given: The head's output in a probe, (rows, tokens, V), or None if it was not called.
        logits: The model's logits, (rows, tokens, V).
        config: The model's config.

    Returns:
        The head, or why its loss needs logits, a short phrase.
    """
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
    error = torch.linalg.vector_norm(scale * found - wanted) / torch.linalg.vector_norm(wanted).clamp_min(1e-30)
    if not float(error) <= TOLERANCES.get(logits.dtype, 0.0):
        return "its logits are not a function of its head's output alone"
    if torch.equal(given, logits) or abs(scale - 1) < 1e-6 or (softcap is not None and abs(scale - 1) < 1e-2):
        scale = 1.0
    elif softcap is not None:
        return "its logits are both scaled and soft-capped"
    return Head(scale, softcap)
