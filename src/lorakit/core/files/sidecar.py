"""`lorakit.json`: the one file of ours beside PEFT's, and what it says about the others.

It holds the fingerprint of the base, SHA-256 of weights and config, rank and alpha of each site, and facts
about the training. An adapter without it, or rewritten by another program, still loads; it is then unverified.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.core.files.fingerprinting import Fingerprint
from lorakit.core.files.tensorfile import TensorFile
from lorakit.durable import read_json, sha256_file
from lorakit.errors import AdapterFileError

SIDECAR_FILE = "lorakit.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "lorakit"
"""Stands in the weights file's header as long as no other program has written it anew."""

KINDS_KEY = "kinds"
"""Names of the user's own kinds of site that the adapter was made with."""

MAX_BYTES = 16 << 20

BEGAN = "began"
"""Where it says how an adapter began whose init moved the base: its config's words, each site's rank and alpha."""


@dataclass(frozen=True)
class Sidecar:
    """What `lorakit.json` says; every field is empty where there is no such file.

    Attributes:
        present: The file is there.
        weights_sha256: The weights' SHA-256, and before it that of the file they replaced while being written.
        config_sha256: The config's SHA-256.
        base: Fingerprint of the base, or None.
        sites: Site -> {"r", "lora_alpha"}.
        facts: Everything else: training facts, names, hashes.
        began: How an adapter began whose init moved the base; else empty.
    """

    present: bool
    weights_sha256: tuple[str, ...]
    config_sha256: str
    base: Fingerprint | None
    sites: dict[str, dict[str, float]]
    facts: dict[str, Any]
    began: dict[str, Any] = field(default_factory=dict)

    def trusts(self, config_path: Path) -> bool:
        """Whether the config beside it is, byte for byte, the one it was written with."""
        return self.present and self.config_sha256 == sha256_file(config_path)


def read_sidecar(folder: str | os.PathLike[str]) -> Sidecar:
    """Read `lorakit.json` of an adapter's folder, if there is one.

    Raises:
        AdapterFileError: It is damaged, or of a format newer than this version reads.
    """
    path = Path(folder) / SIDECAR_FILE
    if not path.exists():
        return Sidecar(False, (), "", None, {}, {})
    values = read_json(path, MAX_BYTES)
    if not isinstance(values, dict) or not isinstance(values.get("format_version"), int):
        raise AdapterFileError(f"{path}: not a table with a format_version. Remove the file to load unverified.")
    if values["format_version"] > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: format {values['format_version']} is newer than the {FORMAT_VERSION} read here. Update lorakit, "
            "or remove the file to load unverified."
        )
    weights, config, sites = (_table(values.get(key)) for key in ("weights", "config", "sites"))
    shas = tuple(str(weights[key]) for key in ("sha256", "previous_sha256") if weights.get(key))
    known = {"format_version", "weights", "config", "base", "sites", BEGAN}
    facts = {key: value for key, value in values.items() if key not in known}
    base = Fingerprint.from_dict(values["base"]) if values.get("base") else None
    if values.get("base") and base is None:
        raise AdapterFileError(f"{path}: base is not a fingerprint. Remove the file to load unverified.")
    for site, entry in sites.items():
        if not _is_site(entry):
            raise AdapterFileError(
                f"{path}: sites[{site!r}] is {str(entry)[:60]}; numbers r and lora_alpha were expected. Remove the "
                "file to load unverified."
            )
    began = _table(values.get(BEGAN))
    if began and not all(map(_is_site, _table(began.get("sites")).values())):
        raise AdapterFileError(
            f"{path}: {BEGAN} does not hold numbers r and lora_alpha. Remove the file to load it plain."
        )
    return Sidecar(True, shas, str(config.get("sha256", "")), base, sites, facts, began)


def integrity(sidecar: Sidecar, file: TensorFile, path: Path) -> str | None:
    """Whether the weights are those that lorakit wrote.

    Args:
        sidecar: What was written about them.
        file: What was read.
        path: The weights' path, for the message.

    Returns:
        None where they are the same; otherwise the reason why they cannot be verified.

    Raises:
        AdapterFileError: They are lorakit's own and have changed since: damaged.
    """
    if file.sha256 in sidecar.weights_sha256:
        return None
    if sidecar.present and METADATA_KEY in file.metadata:
        raise AdapterFileError(
            f"{path}: damaged: its SHA-256 is {file.sha256[:12]}…, and what was written has "
            f"{''.join(sidecar.weights_sha256[:1])[:12] or 'none'}…. Restore it from a copy."
        )
    if sidecar.present:
        return "the weights were rewritten by another program, so they cannot be verified"
    return f"there is no {SIDECAR_FILE}, so the weights cannot be verified"


def _is_site(entry: Any) -> bool:
    numbers = [entry.get("r"), entry.get("lora_alpha")] if isinstance(entry, dict) else [None]
    return all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
