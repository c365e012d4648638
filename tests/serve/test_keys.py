"""lorakit.serve.keys: the file is checked; a key is found by its text only."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import AdapterFileError, UsageError
from lorakit.serve.keys import find_key, read_keys

HEX = sha256(b"one").hexdigest()
OTHER = sha256(b"two").hexdigest()


def write(path: Path, *keys: Any) -> Path:
    path.write_text(json.dumps({"keys": keys}), encoding="utf-8")
    return path


def test_a_key_is_found_by_its_text(tmp_path: Path) -> None:
    keys = read_keys(
        write(tmp_path / "keys", {"name": "a", "sha256": HEX}, {"name": "b", "sha256": OTHER, "admin": True})
    )
    assert [(key.name, key.models, key.admin) for key in keys] == [("a", None, False), ("b", None, True)]
    assert find_key(keys, "one") is keys[0] and find_key(keys, "two") is keys[1]
    assert find_key(keys, HEX) is find_key(keys, "") is find_key(keys, "\udcff") is None


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [{"name": "a"}],
        [{"name": "a b", "sha256": HEX}],
        [{"name": "a", "sha256": HEX.upper()}],
        [{"name": "a", "sha256": "one"}],
        [{"name": "a", "sha256": HEX, "modles": []}],
        [{"name": "a", "sha256": HEX, "admin": "yes"}],
        [{"name": "a", "sha256": HEX}, {"name": "a", "sha256": OTHER}],
        [{"name": "a", "sha256": HEX}, {"name": "b", "sha256": HEX}],
    ],
)
def test_mistakes_are_errors(tmp_path: Path, keys: list[Any]) -> None:
    with pytest.raises(UsageError) as caught:
        read_keys(write(tmp_path / "keys", *keys))
    assert caught.value.where == str(tmp_path / "keys") and caught.value.field == "api_keys"
    assert HEX[:8] not in str(caught.value)


def test_a_file_that_is_missing_or_not_json(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("name: a")
    for name in ("text", "missing"):
        with pytest.raises(AdapterFileError):
            read_keys(tmp_path / name)
