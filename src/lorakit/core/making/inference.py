"""Calls that make or write tensors, inside `torch.inference_mode`: what is made there could never be trained.

A base from outside such a block gets tensors as if the block were not there. A base that was itself made in one can
only be used in one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

from lorakit.errors import ModelError

Function = TypeVar("Function", bound=Callable[..., Any])


def trainable_tensors(function: Function) -> Function:
    """A function over a model whose tensors can be trained on afterwards, also where it is called in inference mode.

    Args:
        function: Takes the model first.
    """

    @wraps(function)
    def called(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside, first = torch.is_inference_mode_enabled(), next(model.parameters(), None)
        if (first is not None and first.is_inference()) != inside:
            if not inside:
                raise ModelError(
                    f"This {type(model).__name__} was made in torch.inference_mode(), so torch neither trains it nor "
                    "tracks it outside of such a block. Make or load it outside, or work with it inside."
                )
            with torch.inference_mode(False):
                return function(model, *args, **kwargs)
        return function(model, *args, **kwargs)

    return cast(Function, called)
