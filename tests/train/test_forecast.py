"""Checks before any data is read: processes and devices."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import NotYetSupported, UsageError
from lorakit.train.forecast import check_single_process, pick_device


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_single_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotYetSupported, match=r"WORLD_SIZE is 2: .*not supported"):
        check_single_process()


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match=r"device is 'cuda:99'.* \d+ CUDA devices?"):
        pick_device("cuda:99")
