"""What inits that look at data need of each site: a few small tensors, to hand to `attach`, or to keep in a file.

A file is safetensors with the config in its header; a pickle is never read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.files.tensorfile import encode, read_tensors
from lorakit.durable import write_bytes
from lorakit.errors import AdapterFileError, ConfigError

KEY = "lorakit_statistics"
"""Stands in the file's header, and says the format."""


@dataclass(frozen=True)
class Statistics:
    """What was made of the data.

    Attributes:
        config: The config to attach: the one that was given, for "eva" with the ranks that the data propose.
        sites: Path -> name -> tensor (…), as the init's row wants them.
        others_usual: Sites that are not among them begin as with True; otherwise they are refused.
    """

    config: LoraConfig
    sites: Mapping[str, Mapping[str, Tensor]]
    others_usual: bool = False

    def check(self, config: LoraConfig) -> None:
        """Refuse a config of another init.

        Raises:
            ConfigError: The message names both.
        """
        if config.init_lora_weights != self.config.init_lora_weights:
            raise ConfigError(
                f"The statistics are for init_lora_weights={self.config.init_lora_weights!r}, and the config says "
                f"{config.init_lora_weights!r}. Attach the config that the statistics hold, or collect them anew."
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
        words = {"format": "pt", KEY: "1", "config": json.dumps(self.config.as_json(), sort_keys=True)}
        write_bytes(path, encode(tensors, words))


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read what `Statistics.save` wrote.

    Args:
        path: The file.

    Raises:
        AdapterFileError: It is missing, damaged, or something else, such as a pickle.
    """
    file = read_tensors(path)
    if file.metadata.get(KEY) != "1":
        raise AdapterFileError(
            f"{path}: this is no file of statistics that `Statistics.save` wrote. Collect them anew."
        )
    try:
        values = json.loads(file.metadata["config"])
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        config = LoraConfig(**{name: value for name, value in values.items() if name in known})
    except (KeyError, ValueError, TypeError, AttributeError) as cause:
        raise AdapterFileError(f"{path}: the config in its header cannot be read ({cause}).") from None
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        site, _, name = key.rpartition("/")
        sites.setdefault(site, {})[name] = tensor
    return Statistics(config, sites)
