"""What inits that look at data need of each site: a few small tensors, to hand to `attach`, or to keep in a file.

A file is safetensors with the config and the base's fingerprint in its header; a pickle is never read.
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
from lorakit.core.model.fingerprint import DIFFERENT, Fingerprint, compare, fingerprint
from lorakit.core.model.index import AdapterIndex
from lorakit.durable import parse_json, sha256_bytes, write_bytes
from lorakit.errors import AdapterFileError, BaseMismatchError, ConfigError

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
