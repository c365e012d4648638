"""The caches of PEFT's two-step inits: safetensors here, checked against the model before anything is left on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lorakit.core.files.tensorfile import read_tensors
from lorakit.errors import AdapterFileError, ConfigError

Given = str | PathLike[str] | None


def is_there(path: Given) -> bool:
    """Whether a cache can be read; an empty file, as a name that was only reserved, is none."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


@dataclass(frozen=True)
class Cache:
    """A cache that was read.

    Attributes:
        path: Where it lies.
        tensors: Name -> tensor (…).
        words: What its header says.
    """

    path: str
    tensors: Mapping[str, Tensor]
    words: Mapping[str, str]

    @classmethod
    def of(cls, path: Given) -> Cache:
        """Read it.

        Args:
            path: The file.

        Raises:
            AdapterFileError: It is damaged, or a pickle, as PEFT writes it.
        """
        where = str(path)
        try:
            file = read_tensors(where)
        except AdapterFileError as cause:
            raise AdapterFileError(
                f"{cause} Caches are safetensors here and pickles in PEFT: remove the file, or write what PEFT loads "
                "from it with safetensors.torch.save_file."
            ) from None
        return cls(where, file.tensors, file.metadata)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One of its tensors, such as (out, r).

        Args:
            name: Its name.
            shape: The shape that it must have, or None for any.

        Raises:
            ConfigError: It is not there, has another shape, or is not finite.
        """
        found = self.tensors.get(name)
        if found is None:
            raise ConfigError(
                f"{self.path}: there is nothing for {name}; it is of another model or config. Remove the file."
            )
        if shape is not None and found.shape != shape:
            raise ConfigError(
                f"{self.path}: {name} has shape {tuple(found.shape)}, and {shape} was expected; it is of another model "
                "or config. Remove the file."
            )
        if not bool(torch.isfinite(found).all()):
            raise ConfigError(f"{self.path}: {name} holds NaN or infinite numbers. Remove the file.")
        return found
