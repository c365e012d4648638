"""Statistics for data-dependent inits: moments of inputs, mean gradients, and a file format.

`InputStatistics` and `GradientStatistics` only accumulate what `collecting` supplies. `Statistics` holds the result, a
few small tensors per site, and can be passed to `attach`. Its file is in safetensors format, with the config and the
base fingerprint in the header; pickles are never read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.config.nested import CordaConfig
from lorakit.core.files.tensors import encode, read_tensors
from lorakit.core.linalg import Principal
from lorakit.core.model.fingerprint import DIFFERENT, Fingerprint, compare, fingerprint
from lorakit.core.model.index import AdapterIndex
from lorakit.core.quantization import at_least_fp32
from lorakit.durable import parse_json, sha256_bytes, write_bytes
from lorakit.errors import AdapterFileError, BaseMismatchError, ConfigError, DataError


class InputStatistics:
    """Moments of the rows x (in,) that a site received.

    `calls` is the number of calls to `add`; Σ x (in,) and Σ x·xᵀ (in, in) are None before the first row.
    """

    def __init__(self) -> None:
        self.rows = self.calls = 0
        self.total: Tensor | None = None
        self.gram: Tensor | None = None
        self._squares = 0.0  # The sum of the squares of all elements.

    def add(self, rows: Tensor) -> None:
        """Add rows (n, in), of any floating dtype, to the moments."""
        if not len(rows):
            return
        rows = at_least_fp32(rows.detach())
        product = rows.T @ rows
        self.gram = product if self.gram is None else self.gram.add_(product)
        self._add(1, len(rows), rows.sum(0), float(rows.square().sum(dtype=torch.float64)))

    def merge(self, other: InputStatistics) -> None:
        """Add the rows of another `InputStatistics`."""
        if other.total is None or other.gram is None:
            return
        self._add(other.calls, other.rows, other.total, other._squares)
        self.gram = other.gram.clone() if self.gram is None else self.gram.add_(other.gram)

    def _add(self, calls: int, rows: int, total: Tensor, squares: float) -> None:
        self.calls += calls
        self.rows += rows
        self._squares += squares
        self.total = total.clone() if self.total is None else self.total.add_(total)

    def second_moment(self) -> Tensor:
        """Return Σ x·xᵀ / rows, (in, in), which CorDA calls the covariance; raise a DataError without rows."""
        if self.gram is None:
            raise DataError("No batch reached this site, so its inputs have no second moment.", field="batches")
        return self.gram / self.rows

    def principal(self, k: int) -> Principal:
        """Return at most k principal directions of the rows, in fp32: eigenvectors of the centered second moment.

        Raises:
            DataError: There are no rows.
        """
        if self.total is None or self.gram is None:
            raise DataError("No batch reached this site, so its inputs have no principal directions.", field="batches")
        device = self.total.device
        work = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        mean = self.total.to(work, torch.float64) / self.rows
        variance = max(self._squares - self.rows * float(mean @ mean), 0.0)
        centered = self.gram.to(work, torch.float64) - self.rows * torch.outer(mean, mean)
        squared, columns = torch.linalg.eigh(centered)
        values, vectors = squared.flip(0)[:k].clamp_min(0).sqrt(), columns.flip(1).T[:k]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        ratios = values.square() / variance if variance > 0 else torch.zeros_like(values)
        return Principal(*(part.to(device, torch.float32) for part in (vectors, values, ratios)))


class GradientStatistics:
    """The sum of the gradients of the loss with respect to a site's weight.

    Attributes:
        calls: Number of gradients; a module that is called twice in a forward pass adds two.
        total: Sum of the gradients, canonical (out, in) or (out, in / groups, k…); None before the first gradient.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.calls = 0
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add a canonical gradient (out, in) or (out, in / groups, k…), fp32 or wider, which may be changed later."""
        self.calls += 1
        self.total = gradient if self.total is None else self.total.add_(gradient)

    def mean(self) -> Tensor:
        """Return the mean loss's gradient, (out, in) or (out, in / groups, k…), or raise a DataError."""
        if self.total is None:
            raise DataError("No loss depended on this site, so its weight has no gradient.", field="batches")
        return self.total / self.batches


KEY, FORMAT = "lorakit_statistics", "1"
"""Header key that identifies the file format, and its value."""


@dataclass(frozen=True)
class Statistics:
    """Tensors that an init needs, computed from data.

    Attributes:
        config: The config to attach; for "eva", the config's ranks come from the data.
        sites: The tensors for each site: a dict from path to a dict from name to tensor, of any shape.
        others_usual: Whether sites without tensors are initialized as with `init_lora_weights=True`; otherwise, such
            sites cause an error.
        base: Fingerprint of the base, or None if it is unknown.
    """

    config: LoraConfig
    sites: Mapping[str, Mapping[str, Tensor]]
    others_usual: bool = False
    base: Fingerprint | None = None

    def check(self, config: LoraConfig, model: nn.Module | AdapterIndex) -> None:
        """Check that these statistics match a config and the model to which it is attached.

        Raises:
            ConfigError: The statistics are for a different init.
            BaseMismatchError: The statistics were collected on a different base model.
        """
        wanted = _init_settings(config)
        for field, value in _init_settings(self.config).items():
            if wanted.get(field) != value:
                text = (
                    f"The statistics are for {field}={value!r}, but the config has {wanted.get(field)!r}. Attach the "
                    "config that the statistics were collected for, or collect them again."
                )
                raise ConfigError(text, what=wanted.get(field), field=field, allowed=(str(value),))
        if self.base is not None:
            verdict, reason, _ = compare(self.base, fingerprint(model, like=self.base), "their")
            if verdict == DIFFERENT:
                text = f"The statistics were collected on a different base: {reason}. Collect them again on this base."
                raise BaseMismatchError(text, what=reason)

    @property
    def size_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for tensors in self.sites.values() for t in tensors.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics to a safetensors file; if that fails, an existing file is left unchanged."""
        tensors = {f"{site}/{name}": tensor for site, named in self.sites.items() for name, tensor in named.items()}
        facts = {
            "config": self.config.as_json(),
            "others_usual": self.others_usual,
            "base": None if self.base is None else self.base.as_dict(),
            "sha256": _sha256(tensors),
        }
        write_bytes(path, encode(tensors, {"format": "pt", KEY: FORMAT, "facts": json.dumps(facts, sort_keys=True)}))


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read a file written by `Statistics.save`; raise an AdapterFileError if it is not one."""
    file = read_tensors(path)
    written = file.metadata.get(KEY)
    if written is not None and written != FORMAT:
        text = (
            f"{path}: its format is {written[:20]!r}, not {FORMAT!r}. Update lorakit, or collect the statistics again."
        )
        raise AdapterFileError(text, what=written[:20], where=path, allowed=(FORMAT,))
    if written is None:
        raise _unusable(path, "it was not written by `Statistics.save`")
    try:
        facts = parse_json(file.metadata["facts"])
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        config = LoraConfig(**{name: value for name, value in facts["config"].items() if name in known})
        others_usual, given, sha256 = bool(facts["others_usual"]), facts["base"], facts["sha256"]
    except (KeyError, ValueError, TypeError, AttributeError) as cause:
        raise _unusable(path, f"its header cannot be read ({cause})") from None
    base = None if given is None else Fingerprint.from_dict(given)
    if given is not None and base is None:
        raise _unusable(path, "the base entry in its header is not a fingerprint")
    if _sha256(file.tensors) != sha256:
        raise _unusable(path, "the file is damaged: its tensors do not match their checksum")
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        site, _, name = key.rpartition("/")
        if not bool(torch.isfinite(tensor).all()):
            raise _unusable(path, f"{key} contains NaN or infinite values")
        sites.setdefault(site, {})[name] = tensor
    return Statistics(config, sites, others_usual, base)


def _unusable(path: str | os.PathLike[str], problem: str) -> AdapterFileError:
    return AdapterFileError(f"{path}: {problem}. Collect the statistics again.", what=problem, where=path)


def _sha256(tensors: dict[str, Tensor]) -> str:
    return sha256_bytes(encode(tensors, {}))


def _init_settings(config: LoraConfig) -> dict[str, bool | str]:
    """Return a dict of the config settings that determine which tensors are collected."""
    settings: dict[str, bool | str] = {"init_lora_weights": config.init_lora_weights}
    if config.init_lora_weights == "corda":
        settings["corda_method"] = (config.corda_config or CordaConfig()).corda_method
    return settings
