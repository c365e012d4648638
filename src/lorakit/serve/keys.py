"""API keys: a file with their hashes, names and permissions.

    {"keys": [{"name": "team-a", "sha256": "HEX", "models": ["legal"], "admin": false}]}

`models` has names of adapters, versions `NAME@HASH12`, or the base's name; without it, a key can use all models. Keys
are random, so that a plain hash is enough.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorakit.durable import read_json
from lorakit.errors import UsageError
from lorakit.serve.served import Served


class Key(BaseModel):
    """A key: its name in logs, the hash of its text, and what it may do."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    models: list[str] | None = None
    admin: bool = False

    def allows(self, served: Served) -> bool:
        """Return whether the key can use a model."""
        return self.models is None or served.id in self.models or served.name in self.models


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[Key] = Field(min_length=1)


ANYONE = Key(name="anyone", sha256="0" * 64, admin=True)
"""The key of every request to a server without keys, which only this machine can reach."""


def read_keys(path: Path) -> list[Key]:
    """Read a file of keys.

    Raises:
        AdapterFileError: The file cannot be read, or is not JSON.
        UsageError: A key is not valid, or two have the same name or hash.
    """
    try:
        keys = _KeysFile.model_validate(read_json(path)).keys
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}: {field}: {first['msg']}.", what=field, where=path, field="api_keys") from None
    for values in ([key.name for key in keys], [key.sha256 for key in keys]):
        if len(set(values)) < len(values):
            text = f"{path}: two keys have the same name or hash; remove one of them."
            raise UsageError(text, where=path, field="api_keys")
    return keys


def find_key(keys: Sequence[Key], text: str) -> Key | None:
    """Return the key with this text, or None; the time does not depend on which key it is."""
    given = sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    found = [key for key in keys if hmac.compare_digest(key.sha256, given)]
    return found[0] if found else None
