"""Whether a fast forward gives what a module gives: both are run on what the module got in one small forward.

The model runs once on a few random tokens, in eval mode and without gradients; nothing of it is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS, TOKENS = 2, 9
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest norm of the difference beside the norm of the output: a few roundings of the dtype, far below any other
arithmetic."""


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        args: Its arguments.
        kwargs: Those by name.
        output: What it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def calls(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Call], Any]:
    """Run a model once on random tokens and keep what some modules got and gave.

    Args:
        model: A transformers model.
        modules: Path -> module.

    Returns:
        Path -> its last call, for those that were called; and the model's output.

    Raises:
        Exception: Whatever the model raises where it does not run on token ids alone.
    """
    found: dict[str, Call] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[path] = Call(args, dict(kwargs), output)

        return hook

    handles = [module.register_forward_hook(keep(path), with_kwargs=True) for path, module in modules.items()]
    try:
        with at_rest(model), torch.inference_mode():  # which leaves no trace for a backward
            output = model(**inputs_of(model))
    finally:
        for handle in handles:
            handle.remove()
    return found, output


def disagreement(module: nn.Module, run: Callable[..., Any], call: Call) -> str | None:
    """How a fast forward differs from a call of the module's own, as a phrase, or None where it does not.

    Args:
        module: The module.
        run: The fast forward.
        call: What the module got and gave.
    """
    with at_rest(module), torch.inference_mode():  # which leaves no trace for a backward
        made = run(module, *call.args, **call.kwargs)
    if made is None:
        return "its calls are none that the recipe is for"
    ours, theirs = _parts(made), _parts(call.output)
    if type(made) is not type(call.output) or len(ours) != len(theirs) or not isinstance(ours[0], Tensor):
        return "it returns something else"
    for found, wanted in zip(ours, theirs, strict=True):
        if found is None:
            continue  # the weights of attention, which are made where somebody asks for them
        if not isinstance(found, Tensor) or not isinstance(wanted, Tensor) or found.shape != wanted.shape:
            return "it returns something else"
        size = float(torch.linalg.vector_norm(wanted.double()))
        error = float(torch.linalg.vector_norm(found.double() - wanted.double())) / max(size, 1e-30)
        if not error <= TOLERANCES.get(wanted.dtype, 0.0):
            return f"a probe differs by {error:.1e} of the output"
    return None


def _parts(output: Any) -> tuple[Any, ...]:
    """What a module returned, one or more things; the first is its output."""
    return output if isinstance(output, tuple) and output else (output,)


def token_ids(model: Any) -> Tensor:
    """A few random token ids, (rows, tokens), drawn beside torch's own generator.

    Args:
        model: A model with input embeddings.
    """
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embeddings.weight.shape[0], (ROWS, TOKENS), generator=generator)
    return ids.to(embeddings.weight.device)


def inputs_of(model: Any) -> dict[str, Any]:
    """The arguments of a small call, without a cache.

    Args:
        model: A model with input embeddings.
    """
    ids = token_ids(model)
    inputs: dict[str, Any] = {"input_ids": ids}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """A block in which every module is in eval mode.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True
