"""AdamW and LoRA-FA over the trainable tensors, their rates, clipping, and their state as named tensors.

The state is kept by parameter name, so that a checkpoint says which moment belongs to which tensor. Knows nothing about
models, steps or files.

AdamW over flat memory: the tensors of a group lie in one buffer, their moments in two more, and a step is few calls.

A parameter stays what it is, and its numbers lie in the buffer; each begins at a multiple of 64 bytes, as in an
allocation of its own, so that every product reads it as before. Gradients are no views: autograd hands over what a
backward made, and a run of neighbours is laid end to end when the step takes it. So none is held during the forward, a
tensor without one is known, and one run of them at most lies twice. Knows nothing about names or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from lorakit.core.optimizers import LoraFA, Pair
from lorakit.errors import RunError

Named = Sequence[tuple[str, nn.Parameter]]
"""Trainable tensors with their names in the model."""

_FUSED_DEVICES = ("cpu", "cuda", "mps")
_EPSILON = 1e-6  # torch's own, in `clip_grads_with_norm_`


def build_adamw(
    named: Named, learning_rate: float, weight_decay: float, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it; only matrices decay, since a magnitude or bias has no reason to shrink.
    [docs/math.md (16)]

    Tensors that can lie in one buffer are laid into one: their numbers stay, and so do the bits of a step. Make the
    optimizer after the model is where and as it will be trained.

    Args:
        named: The trainable tensors.
        learning_rate: The first rate; the loop sets it anew before each step.
        weight_decay: Share of a matrix's value, times the rate, taken away each step.
        rates: Name of a tensor -> its peak rate, where that is not `learning_rate`'s.

    Returns:
        The optimizer, without state.

    Raises:
        RunError: There is nothing to train.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101; betas 0.9 and 0.999, eps 1e-8.
    """
    groups = _groups(named, learning_rate, weight_decay, rates or {})
    if fits([parameter for _, parameter in named]):
        return FlatAdamW(groups, lr=learning_rate)
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for _, p in named)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def build_lorafa(
    named: Named,
    pairs: Sequence[Pair],
    learning_rate: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> LoraFA:
    """LoRA-FA with the groups that `adamw` would have.

    Args:
        named: The trainable tensors, after `lorakit.core.optimizers.freeze_factors`.
        pairs: What that gave.
        learning_rate: The first rate; the loop sets it anew before each step.
        weight_decay: Share of a matrix's value, times the rate, taken away each step.
        rates: Name of a tensor -> its peak rate, where that is not `learning_rate`'s.

    Returns:
        The optimizer, without state.

    Raises:
        RunError: There is nothing to train.
    """
    return LoraFA(_groups(named, learning_rate, weight_decay, rates or {}), pairs, lr=learning_rate)


def _groups(
    named: Named, learning_rate: float, weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Tensors by rate and decay; `share` is a group's peak rate over the run's."""
    if not named:
        raise RunError("There is nothing to train: the model has no trainable tensor.")
    gathered: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        key = (rates.get(name, learning_rate) / learning_rate, weight_decay if parameter.ndim > 1 else 0.0)
        gathered.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": share * learning_rate, "share": share, "weight_decay": decay}
        for (share, decay), members in gathered.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its share of the run's learning rate: one schedule for all, each at its own height."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The common 2-norm of all gradients, a scalar; 0 where there is none.

    Args:
        parameters: Tensors (…); those without a gradient are skipped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: torch.Tensor, max_norm: float
) -> None:
    """Take a step with gradients that are scaled so that their common 2-norm is at most `max_norm`.

    Args:
        optimizer: From `adamw` or `lorafa`. One over flat buffers scales in the pass that steps.
        parameters: The tensors (…) that it trains; `.grad` is scaled or left as it is.
        norm: What `gradient_norm` gave, a scalar.
        max_norm: The largest norm; 0 scales nothing.

    Raises:
        RunError: A tensor is not what it was when the optimizer was made; nothing has changed.
    """
    if isinstance(optimizer, FlatAdamW):
        factor = torch.clamp(max_norm / (norm + _EPSILON), max=1.0).item() if max_norm > 0 else 1.0
        optimizer.step(factor=factor)
        return
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
    optimizer.step()


def state_tensors(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, torch.Tensor]:
    """The optimizer's state under names, ready for a file.

    Args:
        optimizer: From `adamw` or `lorafa`.
        named: The tensors that it trains.

    Returns:
        "exp_avg/<name>", "exp_avg_sq/<name>" (shape of the tensor) and "step/<name>" (scalar), on the CPU.
        A tensor that never had a gradient has no state and no entry.
    """
    tensors = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, named: Named, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` gave.

    Args:
        optimizer: A fresh optimizer over the same tensors.
        named: The tensors that it trains.
        tensors: State by name.

    Raises:
        RunError: A name or shape does not fit; nothing has been put back then.
    """
    shapes = {name: parameter.shape for name, parameter in named}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        wanted = shapes.get(name)
        if wanted is None or kind not in (*MOMENTS, "step") or (kind in MOMENTS and value.shape != wanted):
            raise RunError(
                f"The optimizer state {key} of shape {tuple(value.shape)} does not fit this model's adapter."
            )
    for name, parameter in named:
        state = {kind: tensors[f"{kind}/{name}"] for kind in ("step", *MOMENTS) if f"{kind}/{name}" in tensors}
        if state:
            optimizer.state[parameter] = {key: value.to(parameter.device).clone() for key, value in state.items()}


MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state that has the shape of its tensor; beside it "step" counts the steps that a tensor has taken."""

_ALIGNED = 16
_RUN = {"cpu": 1 << 20, "cuda": 1 << 24}  # numbers: on a CPU 4 MB, which caches hold until AdamW reads them


def fits(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether tensors can lie in one buffer: plain contiguous fp32 tensors of one device, none in another's memory.

    Those of FSDP2 (DTensor), of other precision, on several devices or on MPS cannot; torch's own AdamW takes them.

    Args:
        parameters: Tensors of any shape (…).
    """
    devices = {p.device for p in parameters}
    if len(devices) != 1 or devices.pop().type not in _RUN:
        return False
    if not all(type(p.data) is Tensor and p.dtype == torch.float32 and p.is_contiguous() for p in parameters):
        return False
    return _apart(parameters)


class FlatAdamW(torch.optim.Optimizer):
    """torch's fused AdamW in one call for a run of neighbouring tensors, instead of a pass and a wait for each.

    The bits are torch's; in tensors whose count is no multiple of 16 torch rounds v at the end differently by a bit.
    `state` has for each tensor what torch's has: "step", "exp_avg", "exp_avg_sq", as views of the buffers. A tensor
    without a gradient is left alone: no decay, no moments, no step counted.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Lay the tensors into buffers, one for each group; their numbers stay.

        Args:
            params: Tensors or groups, as any optimizer of torch takes them; `fits` holds for all together.
            lr: Learning rate.
            betas: Decay of the running means of the gradient and of its square.
            eps: Added to the root of the latter.
            weight_decay: Share of a tensor, times the rate, that is taken away each step.
        """
        fixed = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, fixed)
        self._flats = [_Flat(group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, factor: float = 1.0) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew, or None.
            factor: What each gradient is multiplied by first; `.grad` itself may stay as it is.

        Returns:
            What the closure returned.

        Raises:
            RunError: A tensor has another dtype, device or shape than when the optimizer was made; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for flat in self._flats:
            flat.check()
        for group, flat in zip(self.param_groups, self._flats, strict=True):
            flat.gather(self.state)
            flat.step(group, factor)
        return loss


class _Lane:
    """One buffer and the views of it that belong to the members of a group, in their order."""

    def __init__(self, shapes: Sequence[torch.Size], starts: Sequence[int], device: torch.device) -> None:
        self.buffer = torch.zeros(starts[-1], dtype=torch.float32, device=device)
        self.views = [
            self.buffer[start : start + shape.numel()].view(shape) for shape, start in zip(shapes, starts, strict=False)
        ]
        self.places = [view.data_ptr() for view in self.views]


class _Flat:
    """The members of one group, their numbers and their state."""

    def __init__(self, members: Sequence[nn.Parameter]) -> None:
        self.members = list(members)
        self.shapes, self.device = [p.shape for p in members], members[0].device
        sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in members]
        self.starts = list(accumulate(sizes, initial=0))
        self.gap = torch.zeros(_ALIGNED, dtype=torch.float32, device=self.device)  # AdamW leaves zeros at zero
        self.state: dict[str, _Lane] = {}
        self._lay()

    def check(self) -> None:
        """Refuse members that are not what they were."""
        for p, shape in zip(self.members, self.shapes, strict=True):
            if p.dtype != torch.float32 or p.device != self.device or p.shape != shape:
                raise RunError(
                    f"a trained tensor, {tuple(shape)} in float32 on {self.device} when the optimizer was made, is now "
                    f"{tuple(p.shape)} in {str(p.dtype).removeprefix('torch.')} on {p.device}; make the optimizer "
                    "after the model is moved, cast or loaded."
                )
        if self._replaced() and not _apart(self.members):
            raise RunError(
                "trained tensors lie in each other's memory now; make the optimizer after they are replaced."
            )

    def gather(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Bring home numbers and state that were replaced, as by `p.data = …` or `load_state_dict`; make new state."""
        if self._replaced():
            self._lay()
        for i, p in enumerate(self.members):
            own = state.get(p)
            if not own and p.grad is None:
                continue
            for key, lane in (self.state or self._begin()).items():
                if not own:
                    state[p][key] = lane.views[i].zero_()
                elif own[key].data_ptr() != lane.places[i]:
                    own[key] = lane.views[i].copy_(own[key])

    def step(self, group: Mapping[str, Any], factor: float) -> None:
        """AdamW on each run, with the settings of the group."""
        beta1, beta2 = group["betas"]
        for first, last, count in self._runs():
            gradient = self._gradients(first, last)
            if factor != 1:
                gradient.mul_(factor)
            here = slice(self.starts[first], self.starts[first] + len(gradient))
            value, mean, square = (
                lane.buffer[here] for lane in (self.values, self.state["exp_avg"], self.state["exp_avg_sq"])
            )
            adamw(
                [value], [gradient], [mean], [square], [],
                [torch.full((), count, dtype=torch.float32, device=self.device)],
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            self.state["step"].buffer[first:last] += 1
            for p in self.members[first:last]:
                increment_version(p)  # autograd sees no change that goes through the buffer

    def _replaced(self) -> bool:
        """Whether a member's numbers lie elsewhere than here."""
        return any(
            p.data_ptr() != place or not p.is_contiguous()
            for p, place in zip(self.members, self.values.places, strict=True)
        )

    def _lay(self) -> None:
        """Put the members' numbers into a buffer: a new one each time, since who replaced one may hold the old one."""
        self.values = _Lane(self.shapes, self.starts, self.device)
        with torch.no_grad():
            for p, view in zip(self.members, self.values.views, strict=True):
                p.data = view.copy_(p)

    def _begin(self) -> dict[str, _Lane]:
        """Make the buffers of the state, when there is the first: a run to come takes no memory for them."""
        counts = [torch.Size([])] * len(self.members)
        self.state["step"] = _Lane(counts, range(len(counts) + 1), torch.device("cpu"))
        self.state.update({key: _Lane(self.shapes, self.starts, self.device) for key in MOMENTS})
        return self.state

    def _runs(self) -> Iterator[tuple[int, int, float]]:
        """First, last + 1 and steps taken of neighbours that have a gradient and took as many steps."""
        counts = self.state["step"].buffer.tolist() if self.state else []
        first, limit = 0, _RUN[self.device.type]
        for i in range(len(counts)):
            after = i + 1
            if self.members[i].grad is None:
                first = after
                continue
            ends = after == len(counts) or self.members[after].grad is None or counts[after] != counts[first]
            if ends or self.starts[after + 1] - self.starts[first] > limit:
                yield first, after, counts[first]
                first = after

    def _gradients(self, first: int, last: int) -> Tensor:
        """The gradients of a run end to end, as the members lie; that of a single one may be its own `.grad`."""
        pieces = []
        for i in range(first, last):
            gradient: Tensor = self.members[i].grad  # type: ignore[assignment]
            pieces.append(gradient.reshape(-1))
            gap = self.starts[i + 1] - self.starts[i] - gradient.numel()
            if gap:
                pieces.append(self.gap[:gap])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _apart(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether no tensor lies in another's memory."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters if p.numel())
    return all(end <= start for (_, end), (start, _) in pairwise(spans))
