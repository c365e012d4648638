"""Small forwards of a model on random tokens, and the calls that its modules get in them.

The model runs in eval mode and without gradients, and is restored afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit.speed.preserving import preserved

Result = TypeVar("Result")

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

    @property
    def hidden(self) -> Any:
        """The hidden states that the module got."""
        return self.args[0] if self.args else self.kwargs.get("hidden_states")


def attempt(run: Callable[[], Result]) -> Result | Exception:
    """Run a probe and return its result, or the exception that it raised.

    A probe runs the code of other people's models, which may raise any exception; the caller then leaves the part
    alone. Interrupts and exits pass.

    Args:
        run: The probe.
    """
    try:
        return run()
    except Exception as failed:  # noqa: BLE001 - the caller reports its type and leaves the part alone
        return failed


class _Enough(Exception):
    """Ends a forward whose remaining modules nobody asked for."""


def calls(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Call], Any]:
    """Run a model once on random tokens and record the calls of some modules; the caller sees to `at_rest`.

    Args:
        model: A transformers model.
        modules: Path -> module.

    Returns:
        Path -> its last call, for those that were called; and the model's output.

    Raises:
        Exception: Any exception of a model that does not run on token ids alone.
    """
    found: dict[str, Call] = {}
    with _recording(modules, found):
        output = model(**inputs_of(model))
    return found, output


def first_calls(model: nn.Module, modules: Mapping[str, nn.Module], tokens: int) -> dict[str, Call]:
    """Run a model on one row of random tokens until some modules were called; the caller sees to `at_rest`.

    Args:
        model: A transformers model.
        modules: Path -> module.
        tokens: Tokens of the row.

    Returns:
        Path -> call, for those that were called.

    Raises:
        Exception: Any exception of a model that does not run on so many tokens.
    """
    found: dict[str, Call] = {}
    with _recording(modules, found, stop=True), contextlib.suppress(_Enough):
        model(**inputs_of(model, 1, tokens))
    return found


@contextlib.contextmanager
def _recording(modules: Mapping[str, nn.Module], found: dict[str, Call], stop: bool = False) -> Iterator[None]:
    """Add the calls of these modules to `found` during a block; with `stop`, end it when all were called."""

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[path] = Call(args, dict(kwargs), output)
            if stop and len(found) == len(modules):
                raise _Enough

        return hook

    handles = [module.register_forward_hook(keep(path), with_kwargs=True) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_ids(model: Any, rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    """A few random token ids, (rows, tokens), drawn without torch's own generator.

    Args:
        model: A model with input embeddings.
        rows: Rows of the batch.
        tokens: Tokens of each row.
    """
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embeddings.weight.shape[0], (rows, tokens), generator=generator)
    return ids.to(embeddings.weight.device)


def inputs_of(model: Any, rows: int = ROWS, tokens: int = TOKENS) -> dict[str, Any]:
    """The arguments of a small call, without a cache.

    Args:
        model: A model with input embeddings.
        rows: Rows of the batch.
        tokens: Tokens of each row.
    """
    ids = token_ids(model, rows, tokens)
    inputs: dict[str, Any] = {"input_ids": ids}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if hasattr(config, "use_cache") or hasattr(getattr(config, "text_config", None), "use_cache"):
        inputs["use_cache"] = False
    return inputs


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode for a block without gradients, and restore the model after it.

    Inference mode would be wrong here: tensors that a model makes and caches in it can never be trained with.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    with preserved(model), torch.no_grad():
        for module in model.modules():
            module.__dict__["training"] = False  # torch's own way to set an attribute is slow
        yield
