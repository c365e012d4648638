"""Statistics of a base: moments of a site's inputs, whole or as a sketch, its mean gradient, and the file of them.

Moments only add up rows and gradients; where these come from is in `collecting`. What is kept of each site is a few
small tensors, to hand to `attach`. A file is safetensors with the config and the base's fingerprint in its header; a
pickle is never read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.config import CordaConfig, LoraConfig
from lorakit.core.files.tensor_file import encode, read_tensors
from lorakit.core.linalg import Principal
from lorakit.core.model.fingerprint import DIFFERENT, Fingerprint, compare, fingerprint
from lorakit.core.model.index import AdapterIndex
from lorakit.core.quantization import at_least_fp32
from lorakit.durable import parse_json, sha256_bytes, write_bytes
from lorakit.errors import AdapterFileError, BaseMismatchError, ConfigError, DataError


class InputStatistics:
    """Moments of the rows x (in,) that a site received.

    Attributes:
        components: None where the whole second moment is kept, else how many directions are.
        rows: How many rows were counted.
        calls: How often rows came.
        total: Σ x, (in,); None before the first row.
        gram: Σ x·xᵀ, (in, in); None before the first row, and always where `components` is given.
    """

    def __init__(self, components: int | None = None) -> None:
        self.components = components
        self.rows = self.calls = 0
        self.total: Tensor | None = None
        self.gram: Tensor | None = None
        self._sketch: Tensor | None = None  # (≤ components, in): singular values times directions, centred
        self._squares = 0.0  # Σ of squares of all numbers

    def add(self, rows: Tensor) -> None:
        """Count rows.

        Args:
            rows: (n, in), of any floating dtype.
        """
        if not len(rows):
            return
        rows = at_least_fp32(rows.detach())
        if self.components is None:
            self._add(1, len(rows), rows.sum(0), float(rows.square().sum(dtype=torch.float64)))
            product = rows.T @ rows
            self.gram = product if self.gram is None else self.gram.add_(product)
            return
        stacked = [rows - rows.mean(0)]
        if self._sketch is not None and self.total is not None:  # Ross et al. 2008, section 2.1.2
            shift = (self.rows * len(rows) / (self.rows + len(rows))) ** 0.5 * (self.total / self.rows - rows.mean(0))
            stacked = [self._sketch, *stacked, shift[None]]
        _, values, vectors = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
        self._sketch = values[: self.components, None] * vectors[: self.components]
        self._add(1, len(rows), rows.sum(0), float(rows.square().sum(dtype=torch.float64)))

    def merge(self, other: InputStatistics) -> None:
        """Count what another has counted; both keep whole second moments.

        Args:
            other: Statistics of rows of the same width; not changed.
        """
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
        """Σ x·xᵀ / rows, (in, in), not centred: what CorDA calls the covariance.

        Raises:
            DataError: No row was counted, or only a sketch was kept.
        """
        if self.gram is None:
            raise DataError("The second moment was not kept: no row was counted, or `components` was given.")
        return self.gram / self.rows

    def principal(self, k: int) -> Principal:
        """The strongest directions around the mean, as PCA has them.

        Args:
            k: At most so many; fewer where there are fewer.

        Returns:
            Directions, singular values and shares of the variance, in fp32.

        Raises:
            DataError: No row was counted.

        Source:
            Whole: eigenvectors of the centred second moment. Sketch: Ross et al. 2008, doi:10.1007/s11263-007-0075-7.
        """
        if self.total is None:
            raise DataError("No batch reached this site, so its inputs have no directions.")
        device = self.total.device
        work = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        mean = self.total.to(work, torch.float64) / self.rows
        variance = max(self._squares - self.rows * float(mean @ mean), 0.0)
        if self.gram is not None:
            centred = self.gram.to(work, torch.float64) - self.rows * torch.outer(mean, mean)
            squared, columns = torch.linalg.eigh(centred)
            squared, vectors = squared.flip(0)[:k].clamp_min(0), columns.flip(1).T[:k]
            values = squared.sqrt()
        else:
            sketch = self._sketch.to(work, torch.float64)  # type: ignore[union-attr]  # a row was counted
            values = sketch.norm(dim=1)[:k]
            vectors = sketch[:k] / values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        ratios = values.square() / variance if variance > 0 else torch.zeros_like(values)
        return Principal(*(part.to(device, torch.float32) for part in (vectors, values, ratios)))


class GradientStatistics:
    """The gradient of the loss by a site's weight, added up.

    Attributes:
        batches: Batches that were run.
        calls: How often a gradient came; a module that is called twice in a forward gets two.
        total: Sum of the gradients, canonical (out, in) or (out, in / groups, k…); None before the first.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.calls = 0
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Count a gradient.

        Args:
            gradient: Canonical, (out, in) or (out, in / groups, k…), fp32 or wider; it is kept, not copied.
        """
        self.calls += 1
        self.total = gradient if self.total is None else self.total.add_(gradient)

    def mean(self) -> Tensor:
        """The gradient of the mean of the batches' losses, canonical (out, in) or (out, in / groups, k…).

        Raises:
            DataError: No loss depended on this site.
        """
        if self.total is None:
            raise DataError("No loss depended on this site, so its weight has no gradient.")
        return self.total / self.batches


KEY, FORMAT = "lorakit_statistics", "1"
"""What stands in the file's header, and says the format."""


@dataclass(frozen=True)
class Statistics:
    """What was made of the data.

    Attributes:
        config: The config to attach: the one that was given, for "eva" with the ranks that the data propose.
        sites: Path -> name -> tensor (…), as the init's row wants them.
        others_usual: Sites that are not among them begin as with True; otherwise they are refused.
        base: Fingerprint of the base that the data passed through, or None where that is not known.
    """

    config: LoraConfig
    sites: Mapping[str, Mapping[str, Tensor]]
    others_usual: bool = False
    base: Fingerprint | None = None

    def check(self, config: LoraConfig, model: nn.Module | AdapterIndex) -> None:
        """Refuse a config of another init, and another base.

        Args:
            config: The config that is attached.
            model: The model that it is attached to, or its index; only read.

        Raises:
            ConfigError: The message names both.
            BaseMismatchError: The message says what differs.
        """
        for field, asked, held in _said(config, self.config):
            if asked != held:
                raise ConfigError(
                    f"The statistics are for {field}={held!r}, and the config says {asked!r}. Attach the config that "
                    "the statistics hold, or collect them anew."
                )
        if self.base is not None:
            verdict, reason, _ = compare(self.base, fingerprint(model, like=self.base), "their")
            if verdict == DIFFERENT:
                raise BaseMismatchError(
                    f"The statistics were collected on another base: {reason}. Collect them anew on this one.",
                    what=reason,
                )

    @property
    def size_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(t.numel() * t.element_size() for tensors in self.sites.values() for t in tensors.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one safetensors file.

        Raises:
            DiskError: The disk refuses; a file that stood there is whole.
        """
        tensors = {f"{site}/{name}": tensor for site, named in self.sites.items() for name, tensor in named.items()}
        facts = {
            "config": self.config.as_json(),
            "others_usual": self.others_usual,
            "base": None if self.base is None else self.base.as_dict(),
            "sha256": _sha256(tensors),
        }
        write_bytes(path, encode(tensors, {"format": "pt", KEY: FORMAT, "facts": json.dumps(facts, sort_keys=True)}))


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read what `Statistics.save` wrote.

    Args:
        path: The file.

    Raises:
        AdapterFileError: It is missing, damaged, of a newer format, or something else, such as a pickle.
    """
    file = read_tensors(path)
    found = file.metadata.get(KEY)
    if found is not None and found != FORMAT:
        raise AdapterFileError(
            f"{path}: its format is {found[:20]!r}, and {FORMAT!r} is read here. Update lorakit, or collect anew.",
            where=path,
        )
    if found is None:
        raise AdapterFileError(
            f"{path}: this is no file of statistics that `Statistics.save` wrote. Collect them anew.", where=path
        )
    try:
        facts = parse_json(file.metadata["facts"])
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        config = LoraConfig(**{name: value for name, value in facts["config"].items() if name in known})
        others_usual, given, sha256 = bool(facts["others_usual"]), facts["base"], facts["sha256"]
    except (KeyError, ValueError, TypeError, AttributeError) as cause:
        raise AdapterFileError(
            f"{path}: what its header says cannot be read ({cause}). Collect them anew.", where=path
        ) from None
    base = None if given is None else Fingerprint.from_dict(given)
    if given is not None and base is None:
        raise AdapterFileError(f"{path}: the base in its header is not a fingerprint. Collect them anew.", where=path)
    if _sha256(file.tensors) != sha256:
        raise AdapterFileError(
            f"{path}: damaged: its tensors are not those that were written. Collect them anew.", where=path
        )
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        site, _, name = key.rpartition("/")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{path}: {key} holds NaN or infinite numbers. Collect them anew.", where=path)
        sites.setdefault(site, {})[name] = tensor
    return Statistics(config, sites, others_usual, base)


def _sha256(tensors: dict[str, Tensor]) -> str:
    return sha256_bytes(encode(tensors, {}))


def _said(one: LoraConfig, other: LoraConfig) -> list[tuple[str, object, object]]:
    """What two configs say of what decides which tensors are collected: field, what the one says, what the other."""
    found: list[tuple[str, object, object]] = [("init_lora_weights", one.init_lora_weights, other.init_lora_weights)]
    if other.init_lora_weights == "corda":
        first, second = ((config.corda_config or CordaConfig()).corda_method for config in (one, other))
        found.append(("corda_method", first, second))
    return found
