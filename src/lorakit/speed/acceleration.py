"""Rows of a batch laid end to end without padding, each seeing only itself, for models that a probe shows to obey.

`accelerate`: give the parts of a model that are known a faster forward with the same numbers, reversibly.

What is known is told by structure and confirmed by a probe, module by module; everything else stays as it is, and
the report says which and why.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorakit.errors import ModelError
from lorakit.ops.cross_entropy import IGNORED
from lorakit.ops.kernels import compiled
from lorakit.speed import attention, decoder, dropout, encoder, feed_forward, linear, norm, sublayer
from lorakit.speed.admission import Left, Parts, Recipe, admitted, candidates, recorded
from lorakit.speed.contract import contract_for
from lorakit.speed.last_layer import LastLayer, agree
from lorakit.speed.loss import LossWithoutLogits, loss_for
from lorakit.speed.output_head import Head, head_for, last_layer_for, output_head
from lorakit.speed.patching import AGAIN, Swap, is_stand_in, rely, stand_in, undo
from lorakit.speed.probe import Call, at_rest, attempt, calls, frozen, token_ids


def end_to_end(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """One row of all tokens of a batch that are no padding.

    Args:
        input_ids: (rows, length), padded on one side.
        attention_mask: 1 for a token, 0 for padding, (rows, length).
        labels: (rows, length).

    Returns:
        The model's arguments, `input_ids` (1, tokens) and what says where each sequence begins, and labels (1, tokens);
        the first token of a sequence is never predicted, since what stands before it is another's.
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


def obeys(model: Any, logits: Any) -> bool:
    """Whether a model gives two sequences laid end to end what it gives each alone; the caller sees to `at_rest`.

    Args:
        model: A causal transformers model, accelerated.
        logits: The plain model's logits of `token_ids`, (rows, tokens, V).
    """
    ids = token_ids(model)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        return False
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0  # of a causal model, the logits of the tokens that are left stay the same
    inputs, _ = end_to_end(ids, mask, ids)
    packed = attempt(lambda: model(**inputs, use_cache=False).logits[0])
    if isinstance(packed, Exception):  # it does not take such arguments
        return False
    return agree(packed, logits[mask.bool()])


def _named(*words: str) -> Callable[[nn.Module], bool]:
    """Whether one of these words is in the name of a module's class, if it is none with adapters."""
    return lambda module: any(w in type(module).__name__.lower() for w in words) and not linear.is_adapted(module)


RECIPES = (
    Recipe(
        "encoder layer",
        encoder.fits,
        encoder.run,
        lambda module: encoder.layout_of(module) is not None,
        whole=True,
        traced=encoder.traced,
        branches=encoder.branches,
    ),
    Recipe(
        "sublayer",
        sublayer.fits,
        sublayer.run,
        lambda _: False,
        whole=True,
        residual=True,
        traced=sublayer.traced,
        branches=sublayer.branches,
    ),
    Recipe("decoder layer", decoder.fits, decoder.run, _named("layer", "block"), residual=True, calls=decoder.called),
    Recipe("attention", attention.fits, attention.run, _named("attention")),
    Recipe("feed-forward", feed_forward.fits, feed_forward.run, _named("mlp")),
    Recipe("norm", norm.fits, norm.run, _named("norm")),
    Recipe("dropout", dropout.fits, dropout.run, lambda _: False),
    Recipe("adapted linear", linear.fits, linear.run, linear.is_adapted),
)


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to one model.

    Attributes:
        swaps: The modules that have a stand-in, with the recipe of each.
        left: Modules of the same sort that stay as they are.
        head: The head, for a loss without logits, or None.
        head_left: Why the loss needs logits, or "".
        packs: Rows may be packed without padding.
        loss: What computes the model's own loss without logits, or None.
        model: The model that was accelerated; None if nothing was.
    """

    swaps: tuple[tuple[str, Swap], ...]
    left: tuple[Left, ...]
    head: Head | None
    head_left: str
    packs: bool = False
    loss: LossWithoutLogits | None = None
    model: nn.Module | None = None

    def undo(self) -> None:
        """Put every module back, also inside layers that adapters put around it later, and the loss function."""
        if self.loss is not None:
            self.loss.undo()
        if self.model is not None:
            undo(self.model, [swap for _, swap in self.swaps])

    def __str__(self) -> str:
        made = Counter((recipe, type(swap.original).__name__) for recipe, swap in self.swaps)
        lines = [f"{count} × {kind}: {recipe}" for (recipe, kind), count in made.items()]
        rest = Counter((left.kind, left.why) for left in self.left)
        lines += [f"{count} × {kind}: as it is ({why})" for (kind, why), count in rest.items()]
        if self.head is not None and self.head.last is not None:
            kind = type(self.head.last.layer).__name__
            lines.append(f"1 × {kind}, the last: of a loss without logits, trained rows alone behind its attention")
        if self.head_left:
            lines.append(f"loss: from logits ({self.head_left})")
        if self.swaps:
            lines.append(f"between products on a CPU: {compiled.account()}")
        return "\n".join(lines)


def accelerate(model: nn.Module, *, logits: bool = True, keep_feed_forward: bool = True) -> Acceleration:
    """Give every part of a model that is known a faster forward.

    Names in the state dict, saving and `isinstance` do not change. Outputs agree within roundings, as probes of 1, 9
    and 33 tokens show. Attach adapters before or after. A call that a recipe does not know, or after a change of what
    it relies on, runs the module's own forward. If this function raises, the model is as before.

    Args:
        model: A transformers model, perhaps with adapters of ours or of `peft` in it or around it; changed in place,
            and `undo()` of what is returned changes it back.
        logits: False computes the model's own loss without logits, where it is given labels in training mode; the
            output's `logits` are then None, and it has no key-value cache unless the call asks for one.
        keep_feed_forward: False makes what gate and up gave again in the backward instead of keeping it, which is most
            of what a layer keeps, for a second time of their products; the numbers are the same to the bit.

    Returns:
        Which parts got what, and what was left and why; `print` it.

    Raises:
        ModelError: The model, or a part of it, is accelerated already.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return _nothing(model, "its weights are sharded: accelerate it before that")
    if any(is_stand_in(module) for module in model.modules()):
        raise ModelError(
            f"This {type(model).__name__} is accelerated already. Call undo() of what `accelerate` returned before "
            "accelerating it again."
        )
    head = output_head(model)
    with _as_frozen(model), contextlib.ExitStack() as back:  # which puts all back if anything raises on the way
        with at_rest(model):
            probed = _probed(model, head)
        if isinstance(probed, Exception):
            return _nothing(model, f"the model does not run on token ids alone: {type(probed).__name__}")
        swaps = _swapped(model, probed, head, back)
        for module, recipe in () if keep_feed_forward else probed.fast.values():
            if recipe.run in (feed_forward.run, decoder.run, encoder.run):
                module.__dict__[AGAIN] = True
        with at_rest(model):
            packs, loss = _probed_in_place(model, probed, logits)
        if isinstance(loss, LossWithoutLogits):
            back.callback(loss.undo)
            loss.install({id(whole): whole for whole in (model, _inner(model))}.values())
        back.pop_all()
    fused, reason = (probed.head, "") if isinstance(probed.head, Head) else (None, probed.head)
    reason = loss if isinstance(loss, str) else reason
    without = loss if isinstance(loss, LossWithoutLogits) else None
    return Acceleration(tuple(swaps), tuple(probed.left), fused, reason, packs, without, model)


class _Probed(NamedTuple):
    """The result of probing the plain model.

    Attributes:
        fast: The modules that may run a fast forward.
        left: Modules of the same sort that keep their own.
        head: The head, for a loss without logits, or why there is none.
        calls: Path -> call, in the order in which they ended; "" is the head.
        output: What the model returned.
        packs: The plain model keeps packed sequences apart. A fused attention may hand any call back to it.
    """

    fast: Parts
    left: list[Left]
    head: Head | str
    calls: dict[str, Call]
    output: Any
    packs: bool


def _probed(model: nn.Module, head: nn.Module | None) -> _Probed | Exception:
    """Probe the plain model, or return what its forward raised."""
    modules = {path: module for path, module in model.named_modules(remove_duplicate=True) if path}
    wanted, left = candidates(modules, RECIPES)
    ran = attempt(lambda: calls(model, recorded(wanted) | ({} if head is None else {"": head})))
    if isinstance(ran, Exception):
        return ran
    found, output = ran
    fast, others = admitted(model, wanted, found)
    whole = tuple(f"{path}." for path, (_, recipe) in fast.items() if recipe.whole)
    left = [one for one in (*left, *others) if not one.path.startswith(whole)]
    given = found[""].output if "" in found else None
    known = head_for(head, given, getattr(output, "logits", None), getattr(model, "config", None))
    packs = _may_pack(model, fast) and obeys(model, getattr(output, "logits", None))
    return _Probed(fast, left, known, found, output, packs)


def _probed_in_place(model: nn.Module, probed: _Probed, logits: bool) -> tuple[bool, LossWithoutLogits | str | None]:
    """Probe the model with all stand-ins in place.

    Returns:
        Whether rows may be laid end to end; and the loss without logits, not yet installed, or why not, or None.
    """
    head = probed.head if isinstance(probed.head, Head) else None
    last = None if head is None else _last(model, probed.fast, tuple(probed.calls))
    if head is not None and last is not None:
        head.last = last_layer_for(model, head, last, probed.calls[""], probed.output)
    packs = probed.packs and obeys(model, getattr(probed.output, "logits", None))
    return packs, None if logits or head is None else loss_for(_inner(model), head)


def _as_frozen(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Probe a model without adapters as it will be with them: they freeze its weights. Each call looks at that."""
    is_adapted = any(linear.is_adapted(module) for module in model.modules())
    return contextlib.nullcontext() if is_adapted else frozen(model)


def _inner(model: Any) -> Any:
    """The transformers model, without a `PeftModel` around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _last(model: nn.Module, fast: Parts, order: tuple[str, ...]) -> LastLayer | None:
    """The decoder layer that a forward came to last, and what may read it, or None where the model has none of ours.

    Args:
        model: The model, with all stand-ins in place.
        fast: What has one.
        order: Paths of modules as a forward ended with them; "" is the head.
    """
    layers = [path for path in order if path in fast and fast[path][1].run is decoder.run]
    head = output_head(model)
    if not layers or head is None:
        return None
    path = layers[-1]
    above = [path[:place] for place, letter in enumerate(path) if letter == "."]
    holding = [holder for one in above if head not in (holder := model.get_submodule(one)).modules()]
    behind = [model.get_submodule(one) for one in order[order.index(path) + 1 :] if one]
    return LastLayer(model.get_submodule(path), model, path, (*holding, *behind))


def _nothing(model: nn.Module, reason: str) -> Acceleration:
    return Acceleration((), (Left("", type(model).__name__, reason),), None, reason)


def _may_pack(model: Any, fast: Parts) -> bool:
    """Whether the attention of every layer is one of ours, so that packed sequences cannot see each other."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    ours = sum(attention.fits(module) is None for module, _ in fast.values())
    return isinstance(layers, int) and ours == layers


def _within(fused: set[int], name: str) -> Callable[[nn.Module], bool]:
    """Tell of a child whether a recipe passes over what is inside it: all of a whole, and what is fused, too."""
    whole = any(recipe.whole for recipe in RECIPES if recipe.name == name)
    return lambda child: whole or id(child) in fused


def _swapped(
    model: nn.Module, probed: _Probed, head: nn.Module | None, back: contextlib.ExitStack
) -> list[tuple[str, Swap]]:
    """Put the stand-ins in place, after all of them are made.

    Args:
        model: The model.
        probed: Which modules get one.
        head: The output head.
        back: Gets what puts each module back.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                holders.setdefault(id(child), []).append((parent, attribute))
    classes: dict[tuple[type, str], type] = {}
    swaps = []
    known = probed.head if isinstance(probed.head, Head) else None
    plans = [(path, module, recipe.name, recipe.run) for path, (module, recipe) in probed.fast.items()]
    if known is not None and head is not None:
        plans.append(("", head, "loss without logits", known.run))
    for path, module, name, run in plans:
        made = stand_in(module, run, classes, name)
        swaps.append((name, Swap(path, module, made, tuple(holders[id(module)]))))
        if known is not None and module is head:
            known.module, known.places = made, swaps[-1][1].holders
    for _, swap in swaps:
        back.callback(swap.undo)
        swap.do()
    fused = {id(swap.stand_in) for _, swap in swaps}
    for name, swap in swaps:
        rely(swap.stand_in, contract_for(swap.stand_in, _within(fused, name)))
    return swaps
