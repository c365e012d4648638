"""Mutants of settings: config fields, attributes of modules, and entries of the tables from which transformers takes
functions by name.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .mutant_checks import after, before
from .mutant_models import FAMILIES, usual

WAYS = ("built", "set before", "set after")
"""When a setting is changed: before the model is built, before it is accelerated, or after."""

SIMPLE = (bool, int, float, str, type(None))
SKIPPED = ("training", "max_norm", "in_features", "out_features", "num_embeddings", "embedding_dim", "nf", "nx")
"""Attributes of modules that no `forward` reads, and the one with which an embedding changes its weight."""

STRINGS = ("relu", "gelu", "eager", "sdpa")


@dataclass(frozen=True)
class Setting:
    """A changed setting.

    Attributes:
        where: "config", "decoder config", the path of a module, or the name of a table.
        field: Field's name, or key of the entry.
        old: Its value.
        new: Its value in the mutant.
    """

    where: str
    field: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.where} {self.field}: {_shown(self.old)} → {_shown(self.new)}"


def _shown(value: object) -> str:
    return getattr(value, "__name__", None) or repr(value)


def altered(value: object) -> tuple[object, ...]:
    """Return other values for a setting."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return value + 1, value - 1, value // 2
    if isinstance(value, float):
        return value * 1.5 + 0.25, -value
    if isinstance(value, str):
        return tuple(one for one in STRINGS if one != value)
    return 0.5, 2, True


# ---- tables


def averaging(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """Attend to all tokens equally."""
    y = value.mean(2, keepdim=True).expand_as(value).repeat_interleave(query.shape[1] // value.shape[1], 1)
    return y.transpose(1, 2).contiguous() * (query.mean() + key.mean()).sigmoid(), None


def without_mask(*_: Any, **__: Any) -> None:
    """Return no mask."""


def squared(logits: Tensor, **_: Any) -> Tensor:
    """Return a loss that ignores the labels."""
    return logits.square().mean()


TABLES: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "ACT2FN": (ACT2FN, dict.fromkeys(("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"), (nn.Tanh, nn.ReLU))),
    "AttentionInterface": (AttentionInterface._global_mapping, {"sdpa": (averaging,)}),
    "AttentionMaskInterface": (
        AttentionMaskInterface._global_mapping,
        {"sdpa": (without_mask,), "eager": (without_mask,)},
    ),
    "LOSS_MAPPING": (LOSS_MAPPING, {"ForCausalLM": (squared,), "ForMaskedLM": (squared,)}),
}


def entries() -> Iterator[Setting]:
    for where, (table, news) in TABLES.items():
        for field, values in news.items():
            old = dict.__getitem__(table, field)  # ACT2FN creates a module for each access
            yield from (Setting(where, field, old, value) for value in values if value is not old)


# ---- settings of a model


def settings(family: str, way: str) -> Iterator[Setting]:
    """Yield the mutants of the settings of a family that can be changed in a way."""
    model = FAMILIES[family].build()
    yield from entries()
    for where, one in _configs(model):
        if way != "built" or where == "config":
            yield from _altered(where, vars(one))
    if way == "built":
        return
    last = {(type(module), path.rpartition(".")[2]): path for path, module in model.named_modules()}
    for path in last.values():
        yield from _altered(path, vars(model.get_submodule(path)))


def _configs(model: Any) -> Iterator[tuple[str, Any]]:
    yield "config", model.config
    if model.config.is_encoder_decoder:
        yield "decoder config", model.decoder.config


def _altered(where: str, fields: dict[str, Any]) -> Iterator[Setting]:
    for field, value in fields.items():
        if isinstance(value, SIMPLE) and field not in SKIPPED:
            yield from (Setting(where, field, value, new) for new in dict.fromkeys(altered(value)))


def order(family: str, way: str, seed: int) -> list[Setting]:
    """Return the mutants of the settings of a family in the order in which they are tried."""
    found = list(settings(family, way))
    return random.Random(f"{family} {way} {seed}").sample(found, len(found))


def unseen(family: str, way: str, setting: Setting) -> str | None:
    """Return "" if an accelerated model follows a changed setting, otherwise what it does instead.

    Returns None if the change does not count: with it, the plain model fails, or its results are not finite or not
    different.
    """
    usual(family)  # not with the change
    if way != "built":
        return (after if way == "set after" else before)(family, FAMILIES[family].build(), _change(setting))
    words = dict(FAMILIES[family].words)
    if setting.where == "config":
        words[setting.field] = setting.new
    made = dataclasses.replace(FAMILIES[family], words=words)
    with _change(setting)(None) if setting.where in TABLES else nullcontext():
        try:
            model = made.build()
        except Exception:  # noqa: BLE001 - a mutant may fail in any way
            return None
        return before(family, model, lambda _: nullcontext())


def _change(setting: Setting) -> Callable[[Any], AbstractContextManager[None]]:
    @contextmanager
    def change(model: Any) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if setting.where in TABLES:
                patch.setitem(TABLES[setting.where][0], setting.field, setting.new)
            else:
                configs = {} if model is None else dict(_configs(model))
                target = configs[setting.where] if setting.where in configs else model.get_submodule(setting.where)
                patch.setattr(target, setting.field, setting.new)
            yield

    return change
