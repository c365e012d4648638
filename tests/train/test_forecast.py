"""Checks before any data is read: processes and devices."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import UsageError
from lorakit.train.forecast import gpu_of, pick_device
from lorakit.train.processes import Processes


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    second = Processes(1, 2, 1)
    assert pick_device("auto", second) == pick_device("cpu", second) == torch.device("cpu")
    for word in ("cuda:0", "mps"):
        with pytest.raises(UsageError, match="cannot share"):
            pick_device(word, second)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", second) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="finds 2 CUDA devices"):
        pick_device("cuda", Processes(2, 3, 2))


def test_one_gpu_for_two_processes() -> None:
    assert [gpu_of(Processes(5, 8, local), 2) for local in range(2)] == [0, 1]
    for devices in (0, 1):
        with pytest.raises(UsageError, match=r"process 5, .*LOCAL_RANK.* finds \d CUDA device") as caught:
            gpu_of(Processes(5, 8, 1), devices)
        assert (caught.value.field, caught.value.what) == ("device", "1")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match=r"device is 'cuda:99'.* \d+ CUDA devices?"):
        pick_device("cuda:99")
