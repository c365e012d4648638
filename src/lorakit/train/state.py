"""What a run is at a step beside its tensors: position, best so far, random generators, the machine.

Everything here becomes plain JSON or named tensors, so that no checkpoint needs pickle. Knows nothing about files.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit import __version__
from lorakit.errors import RunError
from lorakit.ops.kernels import compiled


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps.

    Attributes:
        step: Optimizer steps done.
        data: Position in the data, as the loader gives it.
        evaluated_step: The last step that was evaluated, or -1.
        best_step: The trained step with the lowest evaluation loss, or None.
        best_loss: Its evaluation loss.
        first_loss: Evaluation loss before the first step.
        last_loss: The newest evaluation loss.
        stale_evaluations: Evaluations since the best one.
        trained_tokens: Trained tokens of all steps.
        tokens: Tokens of all steps.
        seconds: Time in steps, without evaluations and saving.
    """

    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    evaluated_step: int = -1
    best_step: int | None = None
    best_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    stale_evaluations: int = 0
    trained_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def note_evaluation(self, loss: float) -> bool:
        """Take an evaluation of this step into account.

        Args:
            loss: The evaluation loss.

        Returns:
            Whether it is the best of a trained step; the one before the first step is the base's and never is.
        """
        self.evaluated_step, self.last_loss = self.step, loss
        if self.step == 0:
            self.first_loss = loss
            return False
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss, self.stale_evaluations = self.step, loss, 0
            return True
        self.stale_evaluations += 1
        return False

    def as_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """The state that `as_dict` gave.

        Raises:
            RunError: A field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise RunError(f"The checkpoint's state does not have the fields of this version of lorakit ({odd}).")
        return cls(**values)


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of every global random generator that training can draw from.

    Returns:
        Tensors by name ("torch", "cuda/0", "mps": bytes), and the plain part ("python", and "numpy" where it is
        loaded).
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    version, words, gauss = random.getstate()
    plain: dict[str, Any] = {"python": [version, list(words), gauss]}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        plain["numpy"] = [name, keys.tolist(), *(float(r) if isinstance(r, float) else int(r) for r in rest)]
    return tensors, plain


def restore_random_state(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave; generators of devices that are not here are left alone.

    Args:
        tensors: The tensors by name.
        plain: The plain part.
    """
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda/{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda/{i}"], i)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in plain:
        name, keys, *rest = plain["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def environment(
    device: torch.device, dtype: str, quantization: Mapping[str, Any] | None = None, kernels: Sequence[str] = ()
) -> dict[str, Any]:
    """What decides the bits of a result beside the inputs: the same here and there gives the same bits.

    Args:
        device: Where the run computes.
        dtype: Precision of the base.
        quantization: How the base is stored in fewer bits, or None.
        kernels: Where another way than the usual one computes, and which.

    Returns:
        Plain values by name.
    """
    return {
        "lorakit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "dtype": dtype,
        "quantization": dict(quantization) if quantization else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "kernels": list(kernels),
        "compiled_kernels": compiled.kernels() is not None,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, in words.

    Args:
        before: The environment of the checkpoint.
        now: That of this process.

    Returns:
        One phrase per difference, such as "threads was 4 and is 2".
    """
    names = [*before, *(name for name in now if name not in before)]
    return [f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
