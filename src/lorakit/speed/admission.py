"""Decide which modules in a model may run a fused `forward`, based on their structure, their source, and probes.

A module keeps its own `forward` if its source is not in the table of known source, or reads a config field that the
fused `forward` does not implement. As a second line of defense, it also keeps it if a probe raises an exception or
finds a difference, at several sequence lengths and in training mode. The same rules apply to each module that the fused
`forward` would bypass. Outputs are compared row by row, without the residual.

Values that are cached for a tensor are stored in its `__dict__`, so they live exactly as long as the tensor, and cannot
be mistaken for those of a later one with the same `id`; `version_of` detects in-place changes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.architectures.known_forwards import LOSS, MODEL, PART, KnownForwards, unknown_release
from lorakit.core import Int8Linear, LoraLayer
from lorakit.identity.contract import SETTINGS
from lorakit.identity.identities import Identities, Identity, original_class
from lorakit.speed.contract import is_adapted, is_peft_linear
from lorakit.speed.patching import Options, parameters_of, split_call
from lorakit.speed.probe import (
    TOKENS,
    TOLERANCES,
    Call,
    Calls,
    Pairs,
    attempt,
    calls,
    lengths_to_probe,
    training_mode,
)
from lorakit.speed.submodules import is_supported, unknown_fields

SMALLEST_ROW = 0.1
"""Smallest divisor of a row's error, as a fraction of the RMS size of all rows, whose rounding errors it shares."""

NARROW = (torch.float16, torch.bfloat16)
"""Dtypes in which a module may amplify rounding errors beyond the tolerance."""

NOISE = 2.0
"""Allowed error in narrow dtypes, as a multiple of the change in a module's output when its input is rounded."""


class Verdict(NamedTuple):
    """Reason why a module keeps its `forward`, or "", and whether a probe failed, so that it must not be bypassed."""

    why: str = ""
    differs: bool = False


Output = Tensor | tuple[Tensor | None, ...]
"""Output of a fused `forward`. If it is a tuple, the hidden states are the first item."""


def compare(bound: Bound, call: Call, *, residual: bool = False) -> Verdict:
    """Compare the output of a fused `forward` with that of a recorded call; with `residual`, only the branches."""
    module = bound.module
    x, options = split_call(parameters_of(type(module)), call.args, call.kwargs)
    is_accepted = isinstance(x, Tensor) and is_supported(x) and bound.accepts(options)
    output = attempt(lambda: bound.run(x, options) if is_accepted else None)
    if isinstance(output, Exception):
        return _raised(output)
    if output is None:
        return Verdict("its calls are not supported")
    ours, theirs = _parts(output), _parts(call.output)
    if type(output) is not type(call.output) or len(ours) != len(theirs) or not isinstance(ours[0], Tensor):
        return Verdict("its output has a different structure", differs=True)
    for target, (fused, original) in enumerate(zip(ours, theirs, strict=True)):
        if fused is None:
            continue  # attention weights; they are computed only on request
        if not isinstance(fused, Tensor) or not isinstance(original, Tensor) or fused.shape != original.shape:
            return Verdict("its output has a different structure", differs=True)
        carried = call.hidden if residual and target == 0 else None
        verdict = _difference(fused, original, carried)
        if verdict.differs and target == 0 and original.dtype in NARROW:
            verdict = _difference(fused, original, carried, _noise(module, call, residual))
        if verdict.differs:
            return verdict
    return Verdict()


def _noise(module: nn.Module, call: Call, residual: bool) -> Tensor | None:
    """Measure how much each row of a module's branch changes if its input is rounded once more; None if impossible. In
    low precision, sharp attention can amplify rounding errors without bound, even in the module's own `forward`.
    """
    x = call.hidden
    if not isinstance(x, Tensor):
        return None
    generator = torch.Generator().manual_seed(0)
    shaken = torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.device).sub_(0.5).mul_(2)
    moved = (x.float() * (1 + shaken * torch.finfo(x.dtype).eps)).to(x.dtype)
    args = (moved, *call.args[1:]) if call.args else ()
    kwargs = call.kwargs if call.args else call.kwargs | {"hidden_states": moved}
    output = attempt(lambda: _parts(module(*args, **kwargs))[0])
    first = _parts(call.output)[0]
    if not isinstance(output, Tensor) or first is None or output.shape != first.shape:
        return None
    change = _rows(output) - _rows(first)
    return _sizes(change - (_rows(moved) - _rows(x)) if residual else change)


def compare_branches(bound: Bound, call: Call, inside: Calls) -> Verdict:
    """Compare the recorded branches with those that a fused `forward` adds to the residuals."""
    x, options = split_call(parameters_of(type(bound.module)), call.args, call.kwargs)
    pairs = attempt(lambda: bound.branches(x, options, inside))
    if isinstance(pairs, Exception):
        return _raised(pairs)
    for ours, theirs in pairs:
        if ours is None or ours.shape != theirs.shape:
            return Verdict("its output has a different structure", differs=True)
        verdict = _difference(ours, theirs, None)
        if verdict.differs:
            return verdict
    return Verdict()


def _raised(failed: Exception) -> Verdict:
    return Verdict(f"a probe raised {type(failed).__name__}", differs=True)


def _parts(output: Output) -> tuple[Tensor | None, ...]:
    """Return a module's output as a tuple whose first item is the hidden states."""
    return (output or (None,)) if isinstance(output, tuple) else (output,)


def _difference(ours: Tensor, theirs: Tensor, carried: Tensor | None, noise: Tensor | None = None) -> Verdict:
    """Compare two tensors (…, d) row by row, relative to the size of a row of `theirs` without `carried`. `carried`
    (…, d) is in both outputs, such as a residual; `noise` (rows,) is by how much rounding changes each row.
    """
    dtype = theirs.dtype
    tolerance = TOLERANCES.get(dtype, 0.0)
    ours, theirs = _rows(ours), _rows(theirs)
    allowed = torch.zeros(len(theirs), dtype=torch.float64, device=theirs.device)
    branch = theirs
    if isinstance(carried, Tensor) and carried.numel() == theirs.numel():
        branch = theirs - _rows(carried)
        allowed = _sizes(theirs) * torch.finfo(dtype).eps  # both outputs were rounded after the residual was added
    if noise is not None:
        allowed = allowed + NOISE * torch.maximum(noise, noise.square().mean().sqrt())
    sizes = _sizes(branch)
    usual = sizes.square().mean().sqrt() * SMALLEST_ROW
    error = (_sizes(ours - theirs) - allowed).clamp_min(0) / torch.maximum(sizes, usual).clamp_min(1e-30)
    largest = float(error.max()) if len(error) else 0.0
    if largest <= tolerance:
        return Verdict()
    return Verdict(f"the output of a probe differs by {largest:.1e} (relative)", differs=True)


def _rows(x: Tensor) -> Tensor:
    return x.double().reshape(-1, x.shape[-1] if x.ndim else 1)


def _sizes(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def version_of(x: Tensor) -> int | Tensor:
    """Return a version of a tensor of any shape for `is_version`: its counter or, for an inference tensor, a copy."""
    return x.clone() if x.is_inference() else x._version


def is_version(x: Tensor, version: int | Tensor) -> bool:
    """Return whether a tensor of any shape has not changed since `version_of` was called."""
    if isinstance(version, Tensor):
        return torch.equal(x, version)
    return not x.is_inference() and version == x._version


@dataclass(frozen=True)
class Bound(ABC):
    """A fused `forward`, bound to one module when that is matched, with what does not change between calls."""

    module: nn.Module

    @property
    def called(self) -> tuple[str, ...]:
        """Return the names of the children that are called as modules."""
        return ()

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the relative paths of the submodules whose recorded calls `branches` needs."""
        return ()

    def accepts(self, options: Options) -> bool:
        """Return whether calls with these arguments, besides the hidden states, are supported: by default, none is."""
        return not options

    @abstractmethod
    def run(self, x: Tensor, options: Options) -> Output | None:
        """Return the output (…, d) for hidden states x (…, d), or None if the module's own `forward` must run."""

    def branches(self, x: Tensor, options: Options, inside: Calls) -> Pairs:
        """Pair branches (…, d), fused and the module's own, for hidden states x (…, d), if a residual, or a norm after
        it, would hide errors; `inside` has the recorded calls of `traced`.
        """
        return []


@dataclass(frozen=True)
class FusedForward:
    """A kind of fused `forward`, by its name in the report.

    Attributes:
        match: Returns the fused `forward` of a module, or a short reason if its structure does not match.
        concerns: Returns whether to report a module as skipped if its structure does not match.
        whole: Whether it computes everything inside the module, whose children are then not reported.
        residual: Whether the output is the input plus a branch.
    """

    name: str
    match: Callable[[nn.Module], Bound | str]
    concerns: Callable[[nn.Module], bool] = lambda _: False
    whole: bool = False
    residual: bool = False


class Part(NamedTuple):
    """A module and the fused `forward` that matches it."""

    fused_forward: FusedForward
    bound: Bound

    @property
    def module(self) -> nn.Module:
        """Return the module."""
        return self.bound.module


@dataclass(frozen=True)
class Skipped:
    """A module, by path and class name, that keeps its own `forward`, and a short reason why."""

    path: str
    kind: str
    why: str


Parts = dict[str, Part]
"""Dict from path to the module at that path and its fused `forward`."""


@dataclass(frozen=True)
class Known:
    """Identities of the modules in one model, and the table of known source, or None to admit any source. Only the
    script that generates the table passes None. `unknown` has the names of the classes that are not in it.
    """

    identities: Identities
    forwards: KnownForwards | None
    unknown: set[str] = field(default_factory=set)

    def why_not(self, part: Part) -> str | None:
        """Return why the source of a module, or of one that its fused `forward` bypasses, is not known, or None."""
        module = part.module
        if is_adapted(module):
            reasons, inside = [], [module]
        else:
            reasons = [self._why_not(module, part.fused_forward.name)]
            inside = [child for name, child in module.named_children() if name not in part.bound.called]
        reasons += [self._why_not(one, PART) for child in inside for one in _inside(child)]
        return next((reason for reason in reasons if reason is not None), None)

    def why_not_model(self, model: nn.Module) -> str | None:
        """Return why the source of a model's own `forward`, which is cut short, is not known, or None."""
        identity, kind = self.identities.of_forward(original_class(model)), original_class(model)
        return self._known(identity, kind.__name__, MODEL)

    def why_not_loss(self, function: Callable[..., Any]) -> str | None:
        """Return why the source of a loss function is not known, or None."""
        return self._known(self.identities.of_function(function), "its loss function", LOSS)

    def _known(self, identity: Identity, name: str, role: str) -> str | None:
        if self.forwards is None:
            return None
        if not identity.digest:
            return identity.why
        if self.forwards.knows(identity.digest, role):
            return None
        self.unknown.add(name)
        return f"the source of {name} is not known"

    def _why_not(self, module: nn.Module, role: str) -> str | None:
        if isinstance(module, LoraLayer) or type(module) is Int8Linear:
            return None  # its source is that of lorakit
        identity, name = self.identities.of(module), original_class(module).__name__
        if not identity.digest:
            return f"{name}: {identity.why}"
        is_looked_up = bool(identity.functions) and not is_peft_linear(module)  # peft's own source is in no table
        unknown = self._known(identity, name, role) if is_looked_up else None
        return unknown or unknown_fields(module, identity.fields)

    def about_release(self) -> str:
        """Return a message if source is unknown because the release of transformers is, or ""."""
        if self.forwards is None or not self.unknown:
            return ""
        release = unknown_release(self.forwards)
        return release and (
            f"transformers {release} is not among the releases that this version of lorakit knows "
            f"({self.forwards.span}); modules whose source has changed are not accelerated. Update lorakit"
        )


def _inside(module: nn.Module) -> list[nn.Module]:
    """Return a module and the modules inside it; of an adapter layer, only the layer itself and its base layer."""
    if is_adapted(module):
        return [module, *_inside(module.get_submodule("base_layer"))]
    return [module, *(part for child in module.children() for part in _inside(child))]


def candidates(
    modules: Mapping[str, nn.Module], fused_forwards: tuple[FusedForward, ...], known: Known
) -> tuple[Parts, list[Skipped]]:
    """Find the modules that match a fused `forward`, by preference, and whose source is known, and similar ones."""
    wanted: Parts = {}
    skipped: list[Skipped] = []
    inside = {id(part) for layer in modules.values() if is_adapted(layer) for part in _of_adapters(layer)}
    for path, module in modules.items():
        if id(module) in inside:
            continue
        reasons = []
        for fused_forward in fused_forwards:
            bound = fused_forward.match(module)
            if isinstance(bound, str):
                reasons += [bound] if fused_forward.concerns(module) else []
                continue
            stranger = known.why_not(Part(fused_forward, bound))
            if stranger is None:
                wanted[path] = Part(fused_forward, bound)
                break
            reasons.append(stranger)
        else:
            skipped += [Skipped(path, type(module).__name__, reason) for reason in reasons[:1]]
    return wanted, skipped


def modules_to_record(parts: Parts) -> dict[str, nn.Module]:
    """Collect, by path, the candidates and the submodules whose calls are needed to compare branches."""
    modules = {path: part.module for path, part in parts.items()}
    for path, part in parts.items():
        modules |= {f"{path}.{below}": part.module.get_submodule(below) for below in part.bound.traced}
    return modules


def admit(model: nn.Module, wanted: Parts, recorded: Calls) -> tuple[Parts, list[Skipped]]:
    """Probe the candidates, parents before children, inside `eval_mode`; return those admitted, and those to report.
    `recorded` has the calls to `modules_to_record` in a first forward pass.
    """
    firsts, first_of = one_of_each(wanted, recorded)
    elsewhere = _elsewhere(model, firsts)
    verdicts: dict[str, Verdict] = {}
    differing: list[str] = []
    for path in reversed(wanted):  # children before parents
        child = _fused_among(differing, path, wanted[path])
        if child is None:
            verdict = _verdict(path, wanted[path], recorded)
        else:
            verdict = Verdict(f"its {child[len(path) + 1 :]}: {verdicts[child].why}", differs=True)
        verdicts[path] = verdict if verdict.differs else elsewhere.get(first_of[path], verdict)
        if verdicts[path].differs:
            differing.append(path)
    fast = {path: part for path, part in wanted.items() if not verdicts[path].why}
    skipped = [
        Skipped(path, type(part.module).__name__, verdicts[path].why)
        for path, part in wanted.items()
        if verdicts[path].differs or (verdicts[path].why and part.fused_forward.concerns(part.module))
    ]
    return fast, skipped


def _of_adapters(layer: nn.Module) -> list[nn.Module]:
    """Return the modules inside a layer that belong to its adapters rather than to its base layer."""
    base = {id(module) for module in layer.get_submodule("base_layer").modules()}
    return [module for module in layer.modules() if module is not layer and id(module) not in base]


def one_of_each(wanted: Parts, recorded: Collection[str]) -> tuple[Parts, dict[str, str]]:
    """Group the candidates that differ only in their weights, represented by the first module of each group. Returns
    the representatives that were called by path, and a dict from each candidate's path to its representative's.
    """
    first: dict[Any, str] = {}
    first_of = {}
    for path, (fused_forward, bound) in wanted.items():
        module = bound.module
        settings = [path in recorded, type(module), fused_forward.name]
        for name, part in (("", module), *module.named_children()):
            settings += [name, type(part), *sorted(_simple(part))]
        first_of[path] = first.setdefault(tuple(settings), path)
    return {path: wanted[path] for path in first.values() if path in recorded}, first_of


def _simple(module: nn.Module) -> list[str]:
    """Return a module's attributes of simple types as strings, except for its layer index."""
    return [f"{k}={v!r}" for k, v in vars(module).items() if isinstance(v, SETTINGS) and k != "layer_idx"]


def _elsewhere(model: nn.Module, firsts: Parts) -> dict[str, Verdict]:
    """Return a dict from path to verdict, for modules whose fused output differs at another length or in training."""
    differing = {}
    for tokens in (*lengths_to_probe(model), None) if firsts else ():
        where = "in training mode" if tokens is None else f"at length {tokens}"
        with training_mode(model) if tokens is None else contextlib.nullcontext():
            ran = attempt(partial(calls, model, modules_to_record(firsts), 1, tokens or TOKENS, stop=True))
            if isinstance(ran, Exception):
                continue  # the model may not support this length
            recorded, _ = ran
            for path, part in firsts.items():
                verdict = _verdict(path, part, recorded)
                if verdict.differs:
                    differing[path] = Verdict(f"{where}, {verdict.why}", differs=True)
    return differing


def _verdict(path: str, part: Part, recorded: Calls) -> Verdict:
    """Compare the outputs of a module's fused `forward` with those in the recorded calls."""
    call = recorded.get(path)
    if call is None:
        return Verdict("not called")
    verdict = compare(part.bound, call, residual=part.fused_forward.residual)
    if verdict.why or not part.bound.traced:
        return verdict
    inside = {below: recorded[f"{path}.{below}"] for below in part.bound.traced if f"{path}.{below}" in recorded}
    return compare_branches(part.bound, call, inside)


def _fused_among(differing: list[str], path: str, part: Part) -> str | None:
    """Return the path of a module in `differing` that a fused `forward` would bypass, or None."""
    below = [one for one in differing if one.startswith(f"{path}.")]
    called = tuple(f"{path}.{name}." for name in part.bound.called) if below else ()
    return next((one for one in below if not f"{one}.".startswith(called or ("\0",))), None)
