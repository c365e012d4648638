"""`accelerate`: give the parts of a model that are known a faster forward with the same numbers, reversibly.

What is known is told by structure and confirmed by a probe, module by module; everything else stays as it is, and
the report says which and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lorakit.errors import ModelError
from lorakit.ops.kernels import compiled
from lorakit.speed import attention, decoder, dropouts, encoder, feed_forward, linear, norms, sublayer
from lorakit.speed.contract import contract_for, replaced_forward
from lorakit.speed.head import Head, head_for, last_layer_for, output_head
from lorakit.speed.last_layer import LastLayer
from lorakit.speed.loss import LossWithoutLogits, loss_for
from lorakit.speed.packing import obeys
from lorakit.speed.probing import Call, calls, disagreement
from lorakit.speed.swapping import AGAIN, Swap, is_stand_in, rely, stand_in, undo


@dataclass(frozen=True)
class Recipe:
    """A fast forward.

    Attributes:
        name: Said in the report.
        fits: Module -> None where it has the structure, else why not, as a short phrase.
        run: Module and the arguments of a call -> the output, or None where the module's own forward has to run.
        concerns: Whether a module that does not fit is reported as left.
        whole: It runs all that is inside by itself, of which nothing is reported then.
    """

    name: str
    fits: Callable[[nn.Module], str | None]
    run: Callable[..., Any]
    concerns: Callable[[nn.Module], bool]
    whole: bool = False


def _named(*words: str) -> Callable[[nn.Module], bool]:
    """Whether one of these words is in the name of a module's class, if it is none with adapters."""
    return lambda module: any(w in type(module).__name__.lower() for w in words) and not linear.is_adapted(module)


RECIPES = (
    Recipe(
        "encoder layer", encoder.fits, encoder.run, lambda module: encoder.layout_of(module) is not None, whole=True
    ),
    Recipe("sublayer", sublayer.fits, sublayer.run, lambda _: False, whole=True),
    Recipe("decoder layer", decoder.fits, decoder.run, _named("layer", "block")),
    Recipe("attention", attention.fits, attention.run, _named("attention")),
    Recipe("feed-forward", feed_forward.fits, feed_forward.run, _named("mlp")),
    Recipe("norm", norms.fits, norms.run, _named("norm")),
    Recipe("dropout", dropouts.fits, dropouts.run, lambda _: False),
    Recipe("adapted linear", linear.fits, linear.run, linear.is_adapted),
)


@dataclass(frozen=True)
class Left:
    """A module that stays as it is.

    Attributes:
        path: Path in the model.
        kind: Its class.
        why: The reason, as a phrase.
    """

    path: str
    kind: str
    why: str


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to one model.

    Attributes:
        swaps: The modules that have a stand-in, with the recipe of each.
        left: Modules of the same sort that stay as they are.
        head: The head, for a loss without logits, or None.
        head_left: Why the loss needs logits, or "".
        packs: Rows may be laid end to end without padding.
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

    Names in the state dict, saving, `isinstance` and the numbers (within roundings) stay as they are. Attach adapters
    before or after. Calls that a recipe does not know run the module's own forward.

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
    modules = {path: module for path, module in model.named_modules(remove_duplicate=True) if path}
    wanted, left = _candidates(modules)
    head = output_head(model)
    heads = {} if head is None else {"": head}
    try:
        found, output = calls(model, {path: module for path, (module, _) in wanted.items()} | heads)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        LookupError,
    ) as failed:  # tokens alone are not its input
        return _nothing(model, f"the model does not run on token ids alone: {type(failed).__name__}")
    fast: dict[str, tuple[nn.Module, Recipe]] = {}
    fitting = {id(module) for module, _ in wanted.values()}
    for path, (module, recipe) in wanted.items():
        why = replaced_forward(module, _within(fitting, recipe.name))
        why = why or _why_not(module, recipe, found.get(path))
        if why is None:
            fast[path] = (module, recipe)
        elif recipe.concerns(module):
            left.append(Left(path, type(module).__name__, why))
    whole = tuple(f"{path}." for path, (_, recipe) in fast.items() if recipe.whole)
    left = [one for one in left if not one.path.startswith(whole)]
    given = found[""].output if "" in found else None
    known = head_for(head, given, getattr(output, "logits", None), getattr(model, "config", None))
    fused, reason = (known, "") if isinstance(known, Head) else (None, known)
    swaps = _swapped(model, fast, fused, head)
    for module, recipe in () if keep_feed_forward else fast.values():
        if recipe.run in (feed_forward.run, decoder.run, encoder.run):
            module.__dict__[AGAIN] = True
    last = None if fused is None else _last(model, fast, tuple(found))
    if fused is not None and last is not None:
        fused.last = last_layer_for(model, fused, last, found[""], output)
    packs = _may_pack(model, fast) and obeys(model)
    loss = None if logits or fused is None else _loss(model, fused)
    reason = loss if isinstance(loss, str) else reason
    without = loss if isinstance(loss, LossWithoutLogits) else None
    return Acceleration(tuple(swaps), tuple(left), fused, reason, packs, without, model)


def _last(model: nn.Module, fast: dict[str, tuple[nn.Module, Recipe]], order: tuple[str, ...]) -> LastLayer | None:
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


def _loss(model: Any, head: Head) -> LossWithoutLogits | str:
    """The loss without logits, installed; or why not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    loss = loss_for(inner, head)
    if isinstance(loss, LossWithoutLogits):
        loss.install({id(whole): whole for whole in (model, inner)}.values())
    return loss


def _may_pack(model: Any, fast: dict[str, tuple[nn.Module, Recipe]]) -> bool:
    """Whether the attention of every layer is one of ours, so that packed sequences cannot see each other."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    ours = sum(attention.fits(module) is None for module, _ in fast.values())
    return isinstance(layers, int) and ours == layers


def _candidates(modules: dict[str, nn.Module]) -> tuple[dict[str, tuple[nn.Module, Recipe]], list[Left]]:
    wanted: dict[str, tuple[nn.Module, Recipe]] = {}
    left: list[Left] = []
    inside = {id(part) for layer in modules.values() if linear.is_adapted(layer) for part in _of_adapters(layer)}
    for path, module in modules.items():
        if id(module) in inside:
            continue
        reasons = []
        for recipe in RECIPES:
            why = recipe.fits(module)
            if why is None:
                wanted[path] = (module, recipe)
                break
            if recipe.concerns(module):
                reasons.append(why)
        else:
            left += [Left(path, type(module).__name__, reason) for reason in reasons[:1]]
    return wanted, left


def _of_adapters(layer: Any) -> list[nn.Module]:
    """The modules inside a layer that are an adapter's and not the base's."""
    base = {id(module) for module in layer.base_layer.modules()}
    return [module for module in layer.modules() if module is not layer and id(module) not in base]


def _why_not(module: nn.Module, recipe: Recipe, call: Call | None) -> str | None:
    return "it was not called" if call is None else disagreement(module, recipe.run, call)


def _within(fused: set[int], name: str) -> Callable[[nn.Module], bool]:
    """Tell of a child whether a recipe passes over what is inside it: all of a whole, and what is fused, too."""
    whole = any(recipe.whole for recipe in RECIPES if recipe.name == name)
    return lambda child: whole or id(child) in fused


def _swapped(
    model: nn.Module, fast: dict[str, tuple[nn.Module, Recipe]], known: Head | None, head: nn.Module | None
) -> list[tuple[str, Swap]]:
    """Put the stand-ins in place; nothing here can refuse."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                holders.setdefault(id(child), []).append((parent, attribute))
    classes: dict[tuple[type, str], type] = {}
    swaps = []
    plans = [(path, module, recipe.name, recipe.run) for path, (module, recipe) in fast.items()]
    if known is not None and head is not None:
        plans.append(("", head, "loss without logits", known.run))
    for path, module, name, run in plans:
        made = stand_in(module, run, classes, name)
        swap = Swap(path, module, made, tuple(holders[id(module)]))
        swap.do()
        swaps.append((name, swap))
        if known is not None and module is head:
            known.module, known.places = made, swap.holders
    fused = {id(swap.stand_in) for _, swap in swaps}
    for name, swap in swaps:
        rely(swap.stand_in, contract_for(swap.stand_in, _within(fused, name)))
    return swaps
