"""Adapters whose checkpoints did not fit: which are kept, and what is said of a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import DiskError
from lorakit.train import adapter_only


def _write(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, best in ((2, 2), (4, 4), (6, 4), (10, 4)):
        path = adapter_only.save(tmp_path, step, best, _write)
        assert path == adapter_only.place(tmp_path, step)
        assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in adapter_only.saved(tmp_path)] == ["adapter-only-4", "adapter-only-10"]
    adapter_only.prune(tmp_path, 12, 12)
    assert adapter_only.saved(tmp_path) == []


def test_a_failed_one_leaves_the_older_and_no_part(tmp_path: Path) -> None:
    adapter_only.save(tmp_path, 2, None, _write)

    def full(folder: Path) -> None:
        _write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskError, match=r"adapter-only-4: cannot be written \(No space left on device\)"):
        adapter_only.save(tmp_path, 4, None, full)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter-only-2"]


def test_an_account_names_what_is_there_and_good(tmp_path: Path) -> None:
    assert adapter_only.account(tmp_path / "none").endswith("no checkpoint and no adapter.")
    (tmp_path / "checkpoint-3").mkdir()  # damaged
    adapter_only.save(tmp_path, 4, None, _write)
    assert adapter_only.account(tmp_path) == f"Saved in {tmp_path}: adapter-only-4 (the adapter alone)."
