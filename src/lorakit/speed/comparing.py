"""Compare a fused forward with the modules_to_record call of a module, row by row and without the residual."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.speed.probe import TOLERANCES, Call, attempt

FLOOR = 0.1
"""Rows below this fraction of the RMS of all rows are compared relative to that RMS: their rounding errors are
as large as those of other rows.
"""

NARROW = (torch.float16, torch.bfloat16)
"""Dtypes in which a module may amplify rounding errors beyond the tolerance."""

NOISE = 2.0
"""Allowed multiple of the module's own reaction to one rounding of its input, in these dtypes."""


class Verdict(NamedTuple):
    """Result of comparing a fused forward with a module.

    Attributes:
        why: Why the module keeps its own forward, a short phrase, or "".
        differs: Whether a probe contradicts the fused forward, so that no other module may run it either.
    """

    why: str = ""
    differs: bool = False


Branches = Callable[[nn.Module, Call, Mapping[str, Call]], list[tuple[Tensor | None, Tensor]]]
"""Module, its call, calls of modules below it by path -> pairs of branches: fused, and the module's own."""


def compare(module: nn.Module, run: Callable[..., Any], call: Call, *, residual: bool = False) -> Verdict:
    """Compare the output of a fused forward with the modules_to_record one.

    Args:
        module: The module.
        run: The fused forward.
        call: The modules_to_record call of the module.
        residual: Whether the output is the input plus a branch; then the branches are compared.
    """
    made = attempt(lambda: run(module, *call.args, **call.kwargs))
    if isinstance(made, Exception):
        return _raised(made)
    if made is None:
        return Verdict("its calls are not supported")
    ours, theirs = _parts(made), _parts(call.output)
    if type(made) is not type(call.output) or len(ours) != len(theirs) or not isinstance(ours[0], Tensor):
        return Verdict("it returns something else", differs=True)
    for place, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
        if found is None:
            continue  # attention weights, which are computed only on request
        if not isinstance(found, Tensor) or not isinstance(wanted, Tensor) or found.shape != wanted.shape:
            return Verdict("it returns something else", differs=True)
        carried = call.hidden if residual and place == 0 else None
        verdict = _difference(found, wanted, carried)
        if verdict.differs and place == 0 and wanted.dtype in NARROW:
            verdict = _difference(found, wanted, carried, _noise(module, call, residual))
        if verdict.differs:
            return verdict
    return Verdict()


def _noise(module: nn.Module, call: Call, residual: bool) -> Tensor | None:
    """Measure how far each row of a module's branch moves if its input is rounded once more; None if unknown.

    Sharp attention amplifies rounding errors in low precision beyond any fixed bound, in the module's own forward too.
    """
    x = call.hidden
    if not isinstance(x, Tensor):
        return None
    generator = torch.Generator().manual_seed(0)
    shaken = torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.device).sub_(0.5).mul_(2)
    moved = (x.float() * (1 + shaken * torch.finfo(x.dtype).eps)).to(x.dtype)
    given = (
        replace(call, args=(moved, *call.args[1:]))
        if call.args
        else replace(call, kwargs=call.kwargs | {"hidden_states": moved})
    )
    made = attempt(lambda: _parts(module(*given.args, **given.kwargs))[0])
    first = _parts(call.output)[0]
    if not isinstance(made, Tensor) or made.shape != first.shape:
        return None
    change = _rows(made) - _rows(first)
    return _sizes(change - (_rows(moved) - _rows(x)) if residual else change)


def compare_branches(branches: Branches, module: nn.Module, call: Call, inside: Mapping[str, Call]) -> Verdict:
    """Compare the branches of a fused forward, before the residual, with the modules_to_record ones.

    Args:
        branches: Pairs them.
        module: The module.
        call: The modules_to_record call of the module.
        inside: Calls of modules below it, by path.
    """
    pairs = attempt(lambda: branches(module, call, inside))
    if isinstance(pairs, Exception):
        return _raised(pairs)
    for ours, theirs in pairs:
        if ours is None or ours.shape != theirs.shape:
            return Verdict("it returns something else", differs=True)
        verdict = _difference(ours, theirs, None)
        if verdict.differs:
            return verdict
    return Verdict()


def _raised(failed: Exception) -> Verdict:
    return Verdict(f"a probe raised {type(failed).__name__}", differs=True)


def _parts(output: Any) -> tuple[Any, ...]:
    """Return a module's output as a tuple; the first item is the hidden states."""
    return output if isinstance(output, tuple) and output else (output,)


def _difference(ours: Tensor, theirs: Tensor, carried: Any, noise: Tensor | None = None) -> Verdict:
    """Compare the rows of two tensors (…, d) after subtracting what both carry.

    Args:
        ours: From the fused forward.
        theirs: From the module.
        carried: Part of both, such as a residual, (…, d), or None.
        noise: How far rounding moves each row of the module's own output, (rows,), or None.
    """
    dtype = theirs.dtype
    tolerance = TOLERANCES.get(dtype, 0.0)
    ours, theirs = _rows(ours), _rows(theirs)
    allowed = torch.zeros(len(theirs), dtype=torch.float64, device=theirs.device)
    branch = theirs
    if isinstance(carried, Tensor) and carried.numel() == theirs.numel():
        branch = theirs - _rows(carried)
        allowed = _sizes(theirs) * torch.finfo(dtype).eps  # both outputs were rounded with the residual in them
    if noise is not None:
        allowed = allowed + NOISE * torch.maximum(noise, noise.square().mean().sqrt())
    sizes = _sizes(branch)
    usual = sizes.square().mean().sqrt() * FLOOR
    error = (_sizes(ours - theirs) - allowed).clamp_min(0) / torch.maximum(sizes, usual).clamp_min(1e-30)
    largest = float(error.max()) if len(error) else 0.0
    if largest <= tolerance:
        return Verdict()
    return Verdict(f"a probe differs by {largest:.1e} of the output", differs=True)


def _rows(x: Tensor) -> Tensor:
    return x.double().reshape(-1, x.shape[-1] if x.ndim else 1)


def _sizes(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)
