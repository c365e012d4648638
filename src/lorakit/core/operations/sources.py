"""Where the tensors of a model are read from, one at a time: a model in memory, or safetensors files in a folder.

Knows names and tensors, nothing of adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakit.core.layering.underlying import base_tensors
from lorakit.errors import ModelError


@dataclass(frozen=True)
class TensorSource:
    """Tensors by name, each read when it is asked for.

    Attributes:
        label: What messages call it.
        shapes: Name -> shape.
        read: Name -> tensor (…).
        read_one: Name and number -> the tensor (…) at that place of the first axis, such as one expert of many.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    read_one: Callable[[str, int], Tensor]

    def under(self, names: Sequence[str]) -> str | None:
        """The first of a tensor's names that this source has, or None.

        Args:
            names: In the model; files often leave its first word out, as `transformer.`.
        """
        candidates = [*names, *(name.partition(".")[2] for name in names)]
        return next((candidate for candidate in candidates if candidate in self.shapes), None)


def source_of_model(model: nn.Module, label: str = "the model") -> TensorSource:
    """The parameters and buffers of a model's base; what is merged into it is left out.

    Args:
        model: With or without adapters; only read.
        label: What messages call it.
    """
    tensors = {name: tensor.detach() for name, tensor, _ in base_tensors(model)}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return TensorSource(label, shapes, tensors.__getitem__, lambda name, number: tensors[name][number])


def source_of_folder(folder: str | os.PathLike[str]) -> TensorSource:
    """The tensors of a model directory's safetensors files; only one is in memory at a time.

    Where there is a `model.safetensors`, it holds the model, and other files there are something else.

    Args:
        folder: The directory, or one file.

    Raises:
        ModelError: There is no such folder, it holds no safetensors, or a file is damaged.
    """
    folder = Path(folder)
    whole = folder if folder.is_file() else folder / "model.safetensors"
    beside = sorted(path for path in folder.glob("*.safetensors") if path.is_file()) if folder.is_dir() else []
    files = [whole] if whole.is_file() else beside
    if not files:
        raise ModelError(f"{folder}: there are no safetensors files here, so no weights can be read one by one.")
    homes: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    homes[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as cause:
            raise ModelError(f"{path}: cannot be read as safetensors ({cause}).") from None

    def read(name: str) -> Tensor:
        with safe_open(homes[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_one(name: str, number: int) -> Tensor:
        with safe_open(homes[name], framework="pt") as file:
            one: Tensor = file.get_slice(name)[number]
            return one

    return TensorSource(str(folder), shapes, read, read_one)
