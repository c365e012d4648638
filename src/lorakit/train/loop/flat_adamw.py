"""AdamW on packed buffers.

`FlatAdamW` packs the tensors of a group into one buffer, and their first and second moments into two others, so that a
step takes only a few kernel calls. Each tensor starts at a multiple of 64 bytes, as it would in a separate allocation,
so kernels see the same alignment. Gradients are not packed in advance: the step concatenates them, one run of adjacent
tensors at a time. So no gradient buffer exists during the forward pass, and tensors without a gradient can be detected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from lorakit.errors import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer state entries with the same shape as the tensor; the remaining entry, "step", counts updates."""

_ALIGNED = 16
_RUN = {"cpu": 1 << 20, "cuda": 1 << 24}  # maximum number of elements per kernel call; 4 MB fits in a CPU's cache


def is_packable(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether tensors (any shape) can be packed: contiguous, float32, disjoint, on a single CPU or CUDA device.

    Otherwise (for example, with FSDP2's DTensors, other dtypes, several devices, or MPS), torch's AdamW is used.
    """
    devices = {p.device for p in parameters}
    if len(devices) != 1 or devices.pop().type not in _RUN:
        return False
    is_plain = all(type(p.data) is Tensor and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return is_plain and _is_disjoint(parameters)


class FlatAdamW(torch.optim.Optimizer):
    """torch's fused AdamW, called on runs of adjacent packed tensors instead of on individual tensors.

    Results are bit-identical to torch's, with one exception: if a tensor's element count is not a multiple of 16, torch
    rounds the last elements of the second moment differently. For each tensor, `state` has the same entries as in torch
    ("step", "exp_avg", "exp_avg_sq"), which are views of the buffers. A tensor without a gradient is skipped: its
    values, moments and step count do not change.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float) -> None:
        """Pack the tensors of each group into one buffer; `is_packable` must be True for all of them together."""
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": True})
        self._flats = [_Flat(group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, factor: float = 1.0) -> Any:
        """Take one optimizer step with the gradients times a factor, and return the closure's result, if there is one.

        Raises:
            RunError: The dtype, device or shape of a tensor changed after the optimizer was built; nothing was updated.
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
    """A buffer for one parameter group, and one view of it per tensor, in the order of the tensors."""

    def __init__(self, shapes: Sequence[torch.Size], starts: Sequence[int], device: torch.device) -> None:
        self.buffer = torch.zeros(starts[-1], dtype=torch.float32, device=device)
        self.views = [
            self.buffer[start : start + shape.numel()].view(shape) for shape, start in zip(shapes, starts, strict=False)
        ]
        self.targets = [view.data_ptr() for view in self.views]


class _Flat:
    """The tensors of one parameter group (`members`), with their values and state stored in buffers."""

    def __init__(self, members: Sequence[nn.Parameter]) -> None:
        self.members = list(members)
        self.shapes, self.device = [p.shape for p in members], members[0].device
        sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in members]
        self.starts = list(accumulate(sizes, initial=0))
        self.gap = torch.zeros(_ALIGNED, dtype=torch.float32, device=self.device)  # AdamW keeps the gaps at zero
        self.state: dict[str, _Lane] = {}
        self._pack()

    def check(self) -> None:
        """Raise if a tensor changed in dtype, device or shape, or if tensors were replaced and now share memory."""
        for p, shape in zip(self.members, self.shapes, strict=True):
            if p.dtype != torch.float32 or p.device != self.device or p.shape != shape:
                raise RunError(
                    f"a trainable tensor changed from {tuple(shape)} (float32 on {self.device}) to {tuple(p.shape)} "
                    f"({str(p.dtype).removeprefix('torch.')} on {p.device}); build the optimizer after the model is "
                    "moved, cast or loaded.",
                    what=tuple(p.shape),
                )
        if self._replaced() and not _is_disjoint(self.members):
            raise RunError(
                "trainable tensors share memory; build the optimizer after replacing tensors.", field="named"
            )

    def gather(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copy into the buffers any values and state set by `p.data = …` or `load_state_dict`; create missing state."""
        if self._replaced():
            self._pack()
        for i, p in enumerate(self.members):
            entries = state.get(p)
            if not entries and p.grad is None:
                continue
            for key, lane in (self.state or self._create_state()).items():
                if not entries:
                    state[p][key] = lane.views[i].zero_()
                elif entries[key].data_ptr() != lane.targets[i]:
                    entries[key] = lane.views[i].copy_(entries[key])

    def step(self, group: Mapping[str, Any], factor: float) -> None:
        """Apply AdamW, with the group's settings, to each run of adjacent tensors."""
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
                increment_version(p)  # autograd does not see writes through the buffer

    def _replaced(self) -> bool:
        """Return whether any tensor's values are no longer stored in the buffer."""
        return any(
            p.data_ptr() != target or not p.is_contiguous()
            for p, target in zip(self.members, self.values.targets, strict=True)
        )

    def _pack(self) -> None:
        """Copy the tensors' values into a new buffer, because other code may still use the old buffer."""
        self.values = _Lane(self.shapes, self.starts, self.device)
        with torch.no_grad():
            for p, view in zip(self.members, self.values.views, strict=True):
                p.data = view.copy_(p)

    def _create_state(self) -> dict[str, _Lane]:
        """Create the buffers for the state; called only at the first step."""
        counts = [torch.Size([])] * len(self.members)
        self.state["step"] = _Lane(counts, range(len(counts) + 1), torch.device("cpu"))
        self.state.update({key: _Lane(self.shapes, self.starts, self.device) for key in MOMENTS})
        return self.state

    def _runs(self) -> Iterator[tuple[int, int, float]]:
        """Yield (first, last + 1, step count) for each run of adjacent tensors with gradients and equal step counts."""
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
        """Return the gradients of adjacent tensors as one packed 1-D tensor, which may be a view of a `.grad`."""
        pieces = []
        for i in range(first, last):
            gradient: Tensor = self.members[i].grad  # type: ignore[assignment]
            pieces.append(gradient.reshape(-1))
            gap = self.starts[i + 1] - self.starts[i] - gradient.numel()
            if gap:
                pieces.append(self.gap[:gap])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _is_disjoint(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether no two tensors share memory."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters if p.numel())
    return all(end <= start for (_, end), (start, _) in pairwise(spans))
