"""Adapters saved without a checkpoint: which are kept, and how a run directory is described."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import DiskError
from lorakit.train.files import checkpoint, run_folder


def _write(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 4), (6, 4), (10, 4)):
        path = checkpoint.save_adapter_only(tmp_path, step, best, _write)
        assert path == run_folder.adapter_only_path(tmp_path, step)
        assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in run_folder.adapters_only(tmp_path)] == ["adapter-only-4", "adapter-only-10"]
    checkpoint.prune_adapters_only(tmp_path, 12, 12)
    assert run_folder.adapters_only(tmp_path) == []


def test_a_failed_one_leaves_the_older_and_no_part(tmp_path: Path) -> None:
    checkpoint.save_adapter_only(tmp_path, 2, None, _write)

    def full(folder: Path) -> None:
        _write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match=r"adapter-only-4: cannot be written \(No space left on device\)"):
        checkpoint.save_adapter_only(tmp_path, 4, None, full)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter-only-2"]


def test_an_account_names_what_is_there_and_good(tmp_path: Path) -> None:
    assert checkpoint.describe_saved(tmp_path / "none").endswith("no checkpoint and no adapter.")
    (tmp_path / "checkpoint-3").mkdir()  # damaged
    checkpoint.save_adapter_only(tmp_path, 4, None, _write)
    assert checkpoint.describe_saved(tmp_path) == f"Saved in {tmp_path}: adapter-only-4 (the adapter alone)."
