"""The calibration of an int8 base is kept for later runs with the same start, and for no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core
from lorakit.caches import INT8
from lorakit.durable import sha256_bytes
from lorakit.errors import RunError
from lorakit.train import run
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import run_int8

PROCESSOR = run_int8.unsupported(torch.device("cpu"))
needs_units = pytest.mark.skipif(bool(PROCESSOR), reason=PROCESSOR)
KEY = "0" * 64


@pytest.fixture
def settings(short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run with int8 matmuls and two steps; any calibration is kept."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_int8, "LEAST_SECONDS", 0.0)
    return {
        **short_run,
        "base_matmul": "int8",
        "int8_loss_bound": 10.0,
        "max_steps": 2,
        "overwrite": True,
        "tuning": False,
    }


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[core.Int8Base]:
    """The bases that were calibrated."""
    found, quantize = list[core.Int8Base](), core.quantize_base

    def counted(*given: Any, **more: Any) -> core.Int8Base:
        found.append(quantize(*given, **more))
        return found[-1]

    monkeypatch.setattr(run_int8.core, "quantize_base", counted)
    return found


def trained(settings: dict[str, Any], **more: Any) -> tuple[dict[str, Any], str]:
    """Train, and return the record of the int8 base and the hash of the adapter."""
    result = run(TrainSettings(**{**settings, **more}))
    assert result.adapter is not None
    record = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))["int8"]
    return record, core.read_for_training(result.adapter).weights_sha256


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / INT8.place).glob("*"))


@needs_units
def test_a_run_with_the_same_start_reuses_the_calibration_bit_for_bit(
    settings: dict[str, Any], calibrated: list[core.Int8Base]
) -> None:
    first = trained(settings)
    assert len(calibrated) == 1
    assert trained(settings) == first
    assert len(calibrated) == 1


@pytest.mark.costly(cases=0)
@needs_units
@pytest.mark.parametrize(
    "other",
    [{"dtype": "bfloat16"}, {"max_length": 20}, {"seed": 1}, {"r": 3}, {"per_device_train_batch_size": 1}],
    ids=str,
)
def test_another_start_is_calibrated(
    settings: dict[str, Any], calibrated: list[core.Int8Base], other: dict[str, Any]
) -> None:
    trained(settings)
    trained(settings, **other)
    assert len(calibrated) == 2


@pytest.mark.costly
@needs_units
@pytest.mark.parametrize("damage", ["", "{", "scales", "record"])
def test_a_damaged_file_is_ignored_and_replaced(
    settings: dict[str, Any], calibrated: list[core.Int8Base], tmp_path: Path, damage: str
) -> None:
    first = trained(settings)
    (path,) = kept(tmp_path)
    text = path.read_text()
    values = json.loads(text)
    if damage == "scales":
        values["scales"] = values["scales"][:-8] + "AAAAAAA="
    elif damage == "record":
        values["record"] = values["record"].replace('"kept": 16', '"kept": 15')
    path.write_text(json.dumps(values) if damage in values else damage)
    assert trained(settings) == first
    assert len(calibrated) == 2
    assert path.read_text() == text


@needs_units
def test_the_bound_of_the_loss_is_that_of_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    trained(settings)
    (path,) = kept(tmp_path)
    found = run_int8.calibration_kept(path.stem)
    assert found is not None
    record, scales = found
    assert (
        run_int8.keep_calibration(path.stem, {**record, "int8_loss": record["loss"] + 9, "loss_error": 0.0}, scales)
        == ""
    )
    with pytest.raises(RunError, match=r"bound 5.*--int8-loss-bound") as caught:
        run(TrainSettings(**{**settings, "int8_loss_bound": 5.0}))
    assert caught.value.field == "int8_loss_bound"


@pytest.mark.costly(cases=0)
@needs_units
def test_without_the_cache_nothing_is_kept_or_reused(
    settings: dict[str, Any], calibrated: list[core.Int8Base], tmp_path: Path
) -> None:
    trained(settings, token_cache=False)
    assert kept(tmp_path) == []
    trained(settings)
    trained(settings, token_cache=False)
    assert len(calibrated) == 3


@needs_units
def test_a_short_calibration_is_not_kept(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_int8, "LEAST_SECONDS", 1e6)
    trained(settings)
    assert kept(tmp_path) == []


def test_what_is_read_is_what_was_written_and_the_oldest_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_int8, "MOST_KEPT", 2)
    scales = bytes(range(256))
    record = {"worst": {"b": 3.0, "a": 1.0}, "scales_sha256": sha256_bytes(scales)}
    for key in "abc":
        assert run_int8.keep_calibration(key, record, scales) == ""
    found = run_int8.calibration_kept("c")
    assert found is not None and found == (record, scales) and list(found[0]["worst"]) == ["b", "a"]
    assert run_int8.calibration_kept("a") is None and len(kept(tmp_path)) == 2


@pytest.mark.parametrize("place", ["another key", "scales of another record"])
def test_what_belongs_to_another_run_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    record = {"scales_sha256": sha256_bytes(b"scales" if place == "another key" else b"others")}
    assert run_int8.keep_calibration(KEY, record, b"scales") == ""
    if place == "another key":
        assert run_int8.calibration_kept(KEY) is not None
        (path,) = kept(tmp_path)
        path.rename(path.with_name("1.json"))
    assert run_int8.calibration_kept("1" if place == "another key" else KEY) is None


def test_an_unwritable_directory_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    assert run_int8.keep_calibration(KEY, {}, b"") != ""
    assert run_int8.calibration_kept(KEY) is None
