"""In-place changes are detected, with and without a change counter."""

from __future__ import annotations

import pytest
import torch

from lorakit.speed.admission import is_version, version_of


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_is_seen(inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.zeros(3)
        assert x.is_inference() == inference
        version = version_of(x)
        assert is_version(x, version)
        x[1] = 1
        assert not is_version(x, version)
        assert is_version(x, version_of(x))
