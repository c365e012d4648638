"""`lorakit.json` binds the config, the weights and itself: what was changed in it is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.config import CONFIG_FILE
from lorakit.core import inspect_adapter, load_adapter, save_adapter
from lorakit.core.files.adapter_folder import FORMAT_VERSION, SIDECAR_FILE
from lorakit.durable import SEAL, is_sealed, json_bytes, parse_json, sealed
from lorakit.errors import AdapterFileError

from ...laws.snapshots import same_bits
from ...laws.zoo import LINEARS, run, with_adapters

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(
        with_adapters(LINEARS, "a", alpha_pattern={"up": 3}),
        tmp_path / "a",
        "a",
        facts={"steps": 3, "by_step": {10: 1, 9: 2}},
    )
    return tmp_path / "a"


def values_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SIDECAR_FILE).read_text())


CHANGES: dict[str, Change] = {
    "alpha of a site": lambda v: v["sites"]["up"].update(lora_alpha=64.0),
    "rank of a site": lambda v: v["sites"]["up"].update(r=2),
    "a site less": lambda v: v["sites"].pop("up"),
    "weights": lambda v: v["weights"].update(sha256="0" * 64),
    "no hash of the weights": lambda v: v["weights"].pop("sha256"),
    "no hash of the config": lambda v: v["config"].pop("sha256"),
    "no base": lambda v: v.update(base=None),
    "a fact": lambda v: v.update(steps=4),
    "a fact more": lambda v: v.update(more=1),
    "no seal": lambda v: v.pop(SEAL),
    "another seal": lambda v: v.update({SEAL: "0" * 64}),
    "a seal of numbers": lambda v: v.update({SEAL: 1}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_any_value_is_an_error(what: str, folder: Path) -> None:
    values = values_of(folder)
    CHANGES[what](values)
    assert values != values_of(folder)
    (folder / SIDECAR_FILE).write_bytes(json_bytes(values))
    for read in (lambda: load_adapter(LINEARS.model(), folder), lambda: inspect_adapter(folder)):
        with pytest.raises(
            AdapterFileError, match=f"{SIDECAR_FILE}: damaged or edited.*remove it to load the adapter unverified"
        ):
            read()
    (folder / SIDECAR_FILE).unlink()
    assert load_adapter(LINEARS.model(), folder).base == "unverifiable"


@pytest.mark.parametrize("key", ["weights", "config"])
def test_hashes_are_required_under_a_seal_too(key: str, folder: Path) -> None:
    values = values_of(folder)
    del values[key]["sha256"]
    (folder / SIDECAR_FILE).write_bytes(json_bytes(sealed(values)))
    with pytest.raises(AdapterFileError, match=SIDECAR_FILE):
        load_adapter(LINEARS.model(), folder)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "2", None])
def test_a_version_that_never_was_is_an_error(version: Any, folder: Path) -> None:
    (folder / SIDECAR_FILE).write_bytes(json_bytes({**values_of(folder), "format_version": version}))
    with pytest.raises(AdapterFileError, match=f"{SIDECAR_FILE}: not a JSON object with a format_version"):
        load_adapter(LINEARS.model(), folder)


def test_an_older_version_beside_newer_weights_is_an_error(folder: Path) -> None:
    """Otherwise a seal could be avoided by writing 1."""
    values = {**values_of(folder), "format_version": 1}
    values["sites"]["up"]["lora_alpha"] = 64.0
    (folder / SIDECAR_FILE).write_bytes(json_bytes(values))
    with pytest.raises(AdapterFileError, match=f"written in format {FORMAT_VERSION}.*{SIDECAR_FILE} is in format 1"):
        load_adapter(LINEARS.model(), folder)


def test_every_flipped_bit_is_noticed_or_means_nothing(folder: Path) -> None:
    data, whole = (folder / SIDECAR_FILE).read_bytes(), values_of(folder)
    noticed = 0
    for position in range(0, len(data), 7):
        for bit in (1, 4, 32):
            flipped = data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]
            (folder / SIDECAR_FILE).write_bytes(flipped)
            try:
                inspect_adapter(folder)
            except AdapterFileError:
                noticed += 1
            else:
                assert parse_json(flipped) == whole
    assert noticed > len(data) // 4


def test_layout_and_order_of_keys_mean_nothing(folder: Path) -> None:
    model, expected = LINEARS.model(), LINEARS.model()
    load_adapter(expected, folder)
    values = dict(reversed(values_of(folder).items()))
    (folder / SIDECAR_FILE).write_text(json.dumps(values, indent=None))
    assert load_adapter(model, folder).warnings == ()
    assert same_bits(run(model, LINEARS.given()), run(expected, LINEARS.given()))


def test_an_edited_config_is_taken_with_a_warning_as_before(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 16}))
    with pytest.warns(UserWarning, match=f"{CONFIG_FILE} was edited"):
        report = load_adapter(LINEARS.model(), folder)
    assert report.config.lora_alpha == 16


def test_a_seal_is_over_what_a_reader_sees() -> None:
    values = {"b": [1, 2.5, None, True], "a": {10: "ten", 9: {"ü": -0.0}}}
    written = sealed(values)
    assert is_sealed(parse_json(json_bytes(written)))
    assert not is_sealed({}) and not is_sealed({SEAL: None})
    assert sealed(written)[SEAL] == written[SEAL]
