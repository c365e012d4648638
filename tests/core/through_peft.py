"""Save an adapter, load and save it with peft, and load it again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from lorakit.core import load_adapter

from ..laws.tolerances import assert_close


def through_peft(
    folder: Path, make: Callable[[], Any], output: Callable[[Any], Tensor], wanted: Tensor
) -> tuple[Any, Any]:
    """Return `folder / "ours"` on new models: loaded and saved by peft, then loaded from there by lorakit as x.

    Both give the wanted output in fp32. Returns peft's model and lorakit's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), str(folder / "ours"))
        assert_close(output(theirs), wanted, torch.float32)
        theirs.save_pretrained(str(folder / "theirs"))
        again = make()
        load_adapter(again, folder / "theirs", "x")
    assert_close(output(again), wanted, torch.float32)
    return theirs, again
