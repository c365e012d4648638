"""Accelerate a model reversibly: give supported modules a fused `forward` that produces the same results.

A module is supported if its source is known and probes confirm that the results agree. Others keep their own `forward`;
the report lists those that resemble a supported one, with the reason. Batches can be packed into one row without
padding if a probe shows that packed sequences do not see each other.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorakit.architectures.known_forwards import known_forwards
from lorakit.choices import BASE_MATMULS, MATMUL_IN_DTYPE, MATMUL_IN_INT8
from lorakit.core import Int8Base, quantize_base
from lorakit.errors import ConfigError, ModelError
from lorakit.identity.identities import Fact, Identities, original_class
from lorakit.ops.int8 import why_no_int8_matmuls
from lorakit.ops.kernels import compiled
from lorakit.speed import attention, decoder, encoder, feed_forward, linear, norm, sublayer
from lorakit.speed.admission import FusedForward, Known, Parts, Skipped, admit, candidates, modules_to_record
from lorakit.speed.attention import BoundAttention
from lorakit.speed.contract import contract_for, contract_of_model, is_adapted
from lorakit.speed.decoder import BoundLayer
from lorakit.speed.encoder import BoundEncoderLayer
from lorakit.speed.feed_forward import BoundFeedForward
from lorakit.speed.last_layer import LastLayer
from lorakit.speed.loss import Head, LossWithoutLogits, head_for, last_layer_for, loss_for, output_head
from lorakit.speed.patching import (
    BOUND,
    RECOMPUTES,
    Fused,
    Options,
    Swap,
    children_of,
    is_replacement,
    make_replacement,
    undo,
)
from lorakit.speed.probe import Call, ModelOutput, attempt, calls, eval_mode, frozen, keeps_sequences_apart, pack_rows
from lorakit.speed.submodules import is_supported
from lorakit.tables import format_bytes


def _named(*names: str) -> Callable[[nn.Module], bool]:
    """Return a predicate for modules that have no adapter and whose class name contains one of the given names."""
    return lambda module: any(name in type(module).__name__.lower() for name in names) and not is_adapted(module)


DECODER_LAYER = "decoder layer"

__all__ = ["Acceleration", "accelerate", "pack_rows"]

FUSED_FORWARDS = (
    FusedForward(
        "encoder layer",
        encoder.match,
        lambda module: encoder.layout_of(module) is not None,
        whole=True,
    ),
    FusedForward("sublayer", sublayer.match, whole=True, residual=True),
    FusedForward(DECODER_LAYER, decoder.match, _named("layer", "block"), residual=True),
    FusedForward("attention", attention.match, _named("attention")),
    FusedForward("feed-forward", feed_forward.match, _named("mlp")),
    FusedForward("norm", norm.match, _named("norm")),
    FusedForward("dropout", norm.match_dropout),
    FusedForward("adapted linear", linear.match, linear.concerns),
)


@dataclass(frozen=True)
class Acceleration:
    """Changes that `accelerate` made to one model.

    Attributes:
        swaps: The replaced modules, each with the name of its fused `forward`.
        skipped: Modules that resemble supported ones but keep their own `forward`.
        head, head_skipped: Output head that can compute the loss without logits, or None, and the reason, or "".
        packs: Whether batches may be packed.
        loss: Loss function that needs no logits and replaces the model's, or None.
        model: The accelerated model; None if nothing was changed.
        release: Message about a release of transformers that lorakit does not know, or "".
        int8, int8_skipped: The base that was quantized for int8 matmuls, or None, and the reason, or "".
    """

    swaps: tuple[tuple[str, Swap], ...]
    skipped: tuple[Skipped, ...]
    head: Head | None
    head_skipped: str
    packs: bool = False
    loss: LossWithoutLogits | None = None
    model: nn.Module | None = None
    release: str = ""
    int8: Int8Base | None = None
    int8_skipped: str = ""

    def undo(self) -> None:
        """Restore the loss function and all modules, including modules inside adapter layers that were added later.

        Raises:
            MergeError: The weights before int8 quantization were not kept, or adapters are merged; int8 stays.
        """
        if self.loss is not None:
            self.loss.undo()
        if self.model is not None:
            undo(self.model, [swap for _, swap in self.swaps])
        if self.int8 is not None:
            self.int8.restore()

    def __str__(self) -> str:
        replaced = Counter((fused_forward, type(swap.original).__name__) for fused_forward, swap in self.swaps)
        lines = [f"{count} × {kind}: {fused_forward}" for (fused_forward, kind), count in replaced.items()]
        rest = Counter((left.kind, left.why) for left in self.skipped)
        lines += [f"{count} × {kind}: unchanged ({why})" for (kind, why), count in rest.items()]
        if self.head is not None and self.head.last is not None:
            kind = type(self.head.last.layer).__name__
            lines.append(f"1 × {kind} (last layer): after attention, only labeled rows are computed")
        lines += _describe_int8(self.int8, self.int8_skipped)
        if self.release:
            lines.append(self.release)
        if self.head_skipped:
            lines.append(f"loss: from logits ({self.head_skipped})")
        if self.swaps:
            lines.append(f"CPU kernels: {compiled.describe()}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    logits: bool = True,
    keep_feed_forward: bool = True,
    base_matmul: str = MATMUL_IN_DTYPE,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    keep: bool = False,
) -> Acceleration:
    """Give supported modules a fused `forward`. The change can be undone.

    State dict names, saving and `isinstance` are unaffected. Outputs agree up to rounding; probes check this. Adapters
    may be attached before or after. A module's own `forward` runs if its fused one does not support a call, or if
    anything that it relies on has changed. An exception leaves the model unchanged, except that without `keep`, its
    base may stay in int8.

    Args:
        model: A transformers model, with or without adapters from lorakit or peft; changed in place.
        logits: If False, a model in training mode that receives labels computes its loss without logits: the `logits`
            in its output are None, and the output has no key-value cache unless the call requests one.
        keep_feed_forward: If False, the outputs of the gate and up projections, most of what a layer saves, are
            recomputed in the backward pass: their matmuls run twice, with bitwise identical results.
        base_matmul: "dtype", or "int8" to store the frozen linear layers in int8 and to multiply in int8, in both
            directions (`lorakit.core.quantize_base`), an approximation. Without fast and exact int8 matmuls on this
            processor, the model keeps its dtype, and the result states the reason.
        calibration: Batches for "int8", as in `quantize_base`.
        keep: Whether to keep the weights before int8 quantization, so that `undo` can restore them.

    Raises:
        ConfigError: `base_matmul` is unknown, or int8 was requested for a quantized or trained base, or without
            calibration batches.
        ModelError: All or part of the model is already accelerated.
    """
    known = Known(Identities(), known_forwards())
    int8, why_not = _int8_base(model, base_matmul, calibration, keep)
    try:
        accelerated = accelerate_known(model, known, logits=logits, keep_feed_forward=keep_feed_forward)
    except BaseException:
        if int8 is not None and keep:
            int8.restore()
        raise
    return replace(accelerated, int8=int8, int8_skipped=why_not)


def accelerate_known(model: nn.Module, known: Known, *, logits: bool, keep_feed_forward: bool) -> Acceleration:
    """Accelerate a model as `accelerate` does, with a given table of known source.

    Raises:
        ModelError: All or part of the model is already accelerated.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return _nothing(model, "its weights are sharded; call accelerate before sharding")
    _check_not_accelerated(model)
    modules = dict(model.named_modules())
    has_adapters = any(is_adapted(module) for module in modules.values())
    # A model without adapters is frozen for the probes, as it will be once it has adapters. Whenever a fused forward
    # runs later, it checks that the weights are frozen.
    with contextlib.nullcontext() if has_adapters else frozen(model), contextlib.ExitStack() as back:
        with eval_mode(model):
            probed = _probed(model, modules, known)
        if isinstance(probed, Exception):
            return _nothing(model, f"the model does not run on token ids alone: {type(probed).__name__}")
        swaps = _installed(modules, probed, back, known.identities)
        for part in () if keep_feed_forward else probed.fast.values():
            if isinstance(part.bound, (BoundFeedForward, BoundLayer, BoundEncoderLayer)):
                part.module.__dict__[RECOMPUTES] = True
        with eval_mode(model):
            packs, loss = _probed_in_place(model, probed, logits, known)
        if isinstance(loss, LossWithoutLogits):
            back.callback(loss.undo)
            loss.install({id(whole): whole for whole in (model, _inner(model))}.values())
        back.pop_all()
    without, reason = (None, loss) if isinstance(loss, str) else (loss, probed.head_skipped)
    return Acceleration(
        tuple(swaps), tuple(probed.skipped), probed.head, reason, packs, without, model, known.about_release()
    )


def _check_not_accelerated(model: nn.Module) -> None:
    """Check that no part of a model is accelerated.

    Raises:
        ModelError: All or part of the model is already accelerated.
    """
    replaced, kind = list[bool](), type(model).__name__
    model.apply(lambda module: replaced.append(is_replacement(module)))
    if any(replaced):
        raise ModelError(f"{kind} is already accelerated; call undo() on the earlier result first", what=kind)


def _int8_base(
    model: nn.Module, base_matmul: str, calibration: Iterable[Mapping[str, Tensor]] | None, keep: bool
) -> tuple[Int8Base | None, str]:
    """Quantize a base for int8 matmuls, if this is requested and the processor multiplies int8 fast and exactly.

    Returns the quantized base, or None, and the reason why it was not quantized although it was requested, or "".

    Raises:
        ConfigError: `base_matmul` is unknown, there is no calibration data, or the base is quantized or trained.
    """
    if base_matmul not in BASE_MATMULS:
        raise ConfigError.of("base_matmul", base_matmul, allowed=BASE_MATMULS)
    if base_matmul == MATMUL_IN_DTYPE:
        return None, ""
    _check_not_accelerated(model)
    if calibration is None:
        text = (
            "base_matmul 'int8' needs calibration batches: pass calibration=[...], each with the arguments of the "
            "model, such as input_ids and attention_mask."
        )
        raise ConfigError(text, what=MATMUL_IN_INT8, field="calibration")
    why = why_no_int8_matmuls()
    return (None, why) if why else (quantize_base(model, calibration, keep=keep), "")


def _describe_int8(base: Int8Base | None, why_not: str) -> list[str]:
    """Return the lines of a report about int8 matmuls; empty if they were not requested."""
    if base is None:
        return [f"base matmuls: in the dtype of the weights, not in int8 ({why_not})"] if why_not else []
    sizes = f"{format_bytes(base.bytes_before)} to {format_bytes(base.bytes_after)}"
    return [f"base matmuls: int8 in {len(base.paths)} modules, calibrated on {base.tokens} tokens; base from {sizes}"]


class _Probed(NamedTuple):
    """Result of probing the unaccelerated model; `skipped`, `head` and `head_skipped` are as in `Acceleration`.

    Attributes:
        fast: Modules that may run a fused `forward`.
        calls: Recorded calls by path, in the order in which they ended; "" is the path of the head.
        output: The model's output.
        packs: Whether the unaccelerated model, to which any call may fall back, keeps packed sequences apart.
    """

    fast: Parts
    skipped: list[Skipped]
    head: Head | None
    head_skipped: str
    calls: dict[str, Call]
    output: ModelOutput | None
    packs: bool


def _probed(model: nn.Module, modules: Mapping[str, nn.Module], known: Known) -> _Probed | Exception:
    """Probe the unaccelerated model; return the result, or the exception that the forward pass raised."""
    head = output_head(model)
    inner = {path: module for path, module in modules.items() if path}
    wanted, skipped = candidates(inner, FUSED_FORWARDS, known)
    ran = attempt(lambda: calls(model, modules_to_record(wanted) | ({} if head is None else {"": head})))
    if isinstance(ran, Exception):
        return ran
    recorded, output = ran
    fast, others = admit(model, wanted, recorded)
    whole = tuple(f"{path}." for path, part in fast.items() if part.fused_forward.whole)
    skipped = [one for one in (*skipped, *others) if not one.path.startswith(whole)]
    logits = getattr(output, "logits", None)
    loss_head = head_for(head, recorded[""].output if "" in recorded else None, logits, model)
    if not isinstance(loss_head, str):
        loss_head = known.why_not_model(_inner(model)) or loss_head
    fused, reason = (None, loss_head) if isinstance(loss_head, str) else (loss_head, "")
    packs = _may_pack(model, fast) and isinstance(logits, Tensor) and keeps_sequences_apart(model, logits)
    return _Probed(fast, skipped, fused, reason, recorded, output, packs)


def _probed_in_place(
    model: nn.Module, probed: _Probed, logits: bool, known: Known
) -> tuple[bool, LossWithoutLogits | str | None]:
    """Probe the model with all replacements in place; return whether batches may be packed, and the loss function.

    The latter needs no logits and is not yet installed, or is the reason why the loss requires logits, or None if
    `logits` is true or there is no suitable head.
    """
    last = None if probed.head is None else _last(model, probed.head, probed.fast, tuple(probed.calls))
    if last is not None and any(known.why_not_model(one) for one in models_above(last)):
        last = None
    if probed.head is not None and last is not None:
        probed.head.last = last_layer_for(probed.head, last, probed.output)
    packs = probed.packs and keeps_sequences_apart(model)
    if probed.head is None:
        return packs, None
    inner = _inner(model)
    loss = None if logits else loss_for(inner, probed.head, known)
    relied_on = [known.identities.of_forward(original_class(inner))]
    relied_on += [] if last is None else [known.identities.of_forward(type(one)) for one in models_above(last)]
    facts: list[Fact] = []
    if isinstance(loss, LossWithoutLogits):
        relied_on.append(known.identities.of_function(loss.found))
        facts += [(loss.table, loss.name, loss.found)] if loss.name is not None else []
    probed.head.holds = contract_of_model(inner, relied_on, facts).holds
    return packs, loss


def models_above(last: LastLayer) -> list[nn.Module]:
    """Return the modules between a model and its last layer whose `forward` runs."""
    return [one for one in last.holders if not isinstance(one, nn.ModuleList)]


def _inner(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a `PeftModel`, or the model itself if it is not a `PeftModel`."""
    return getattr(model, "get_base_model", lambda: model)()


def _last(model: nn.Module, head: Head, fast: Parts, order: tuple[str, ...]) -> LastLayer | None:
    """Return the last decoder layer that a forward pass runs, together with the modules that may read its output.

    Returns None if no decoder layer has been replaced, or if its feed-forward block is not fused. `order` has the paths
    of modules in the order in which their calls ended.
    """
    layers = {path: bound for path in order if path in fast and isinstance(bound := fast[path].bound, BoundLayer)}
    path, layer = next(reversed(layers.items()), ("", None))
    if layer is None or layer.block is None:  # a block that is called as a module, such as experts, may mix tokens
        return None
    above = [path[:target] for target, letter in enumerate(path) if letter == "."]
    holding = [holder for one in above if head.module not in (holder := model.get_submodule(one)).modules()]
    behind = [model.get_submodule(one) for one in order[order.index(path) + 1 :] if one]
    return LastLayer(model.get_submodule(path), model, path, tuple(holding), tuple(behind))


def _nothing(model: nn.Module, reason: str) -> Acceleration:
    return Acceleration((), (Skipped("", type(model).__name__, reason),), None, reason)


def _may_pack(model: nn.Module, fast: Parts) -> bool:
    """Return whether every layer has fused attention, which keeps packed sequences apart."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    ours = sum(isinstance(part.bound, BoundAttention) for part in fast.values())
    return isinstance(layers, int) and ours == layers


def _installed(
    modules: Mapping[str, nn.Module], probed: _Probed, back: contextlib.ExitStack, identities: Identities
) -> list[tuple[str, Swap]]:
    """Create all replacements, then install them; callbacks that restore the modules are added to `back`."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in modules.values():
        for attribute, child in children_of(parent).items():
            holders.setdefault(id(child), []).append((parent, attribute))
    parts = list(probed.fast.values())
    plans = [(one.module, one.fused_forward.name, one.fused_forward.whole) for one in parts]
    if probed.head is not None:
        plans.append((probed.head.module, "loss without logits", False))
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    swaps = []
    for module, name, _ in plans:
        replacement = make_replacement(module, classes)
        swaps.append((name, Swap(module, replacement, tuple(holders[id(module)]))))
    bounds = [replace(one.bound, module=swap.replacement) for one, (_, swap) in zip(parts, swaps, strict=False)]
    runs = [(bound.accepts, _if_supported(bound.run)) for bound in bounds]
    if probed.head is not None:
        probed.head.module, probed.head.holders = swaps[-1][1].replacement, swaps[-1][1].holders
        runs.append((probed.head.accepts, probed.head.run))
    for _, swap in swaps:
        back.callback(swap.undo)
        swap.do()
    fused = {id(swap.replacement) for _, swap in swaps}
    for (*_, whole), (_, swap), (accepts, run) in zip(plans, swaps, runs, strict=True):
        contract = contract_for(swap.replacement, None if whole else fused, identities)
        setattr(swap.replacement, BOUND, Fused(accepts, contract.holds, run))
    return swaps


def _if_supported(run: Callable[[Tensor, Options], Any]) -> Callable[[Tensor, Options], Any]:
    """Return a function that calls `run` only with supported hidden states, and otherwise returns None."""
    return lambda x, options: run(x, options) if is_supported(x) else None
