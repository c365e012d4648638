"""Rules with which transformers' loader renames and joins the tensors of a file; import it inside functions only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from lorakit.errors import AdapterFileError

Join = Callable[[Sequence[Sequence[Tensor]]], Tensor]
"""Function from the tensors of each source pattern, in natural order of their names, to one tensor."""

Rule: TypeAlias = WeightRenaming | WeightConverter
"""One rule of the loader."""

SCOPE = ("scope_prefix", "base_model_prefix")
"""Attributes that restrict a rule to a part of the model; early releases of transformers 5 lack them."""


class JoinTensors(ConversionOps):
    """An operation that joins all tensors of a rule in one call of `join`."""

    def __init__(self, join: Join) -> None:
        self.join = join

    def convert(
        self,
        input_dict: Mapping[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, Tensor]:
        """Return the joined tensor, keyed by the rule's only target pattern.

        The tensors (…) of each source pattern come in natural order of their names.

        Raises:
            AdapterFileError: The file has no tensors for a pattern.
        """
        missing = next((pattern for pattern in source_patterns if pattern not in input_dict), None)
        if missing is not None:
            raise AdapterFileError(
                f"The file has no tensors {missing}, which are a part of {target_patterns[0]}.", what=missing
            )
        return {target_patterns[0]: self.join([input_dict[pattern] for pattern in source_patterns])}


def renaming(source: str, target: str) -> WeightRenaming:
    """Return a rule that replaces a pattern in tensor names."""
    return WeightRenaming(source_patterns=source, target_patterns=target)


def joining(sources: Sequence[str], target: str, join: Join, like: Rule) -> Rule:
    """Return a rule, with the scope of `like`, that joins the tensors whose names match any of several patterns."""
    made = WeightConverter(source_patterns=list(sources), target_patterns=target, operations=[JoinTensors(join)])
    for name in SCOPE:
        if hasattr(like, name):
            setattr(made, name, getattr(like, name))
    return made


def is_renaming(rule: Rule) -> bool:
    """Return whether a rule only renames tensors."""
    return isinstance(rule, WeightRenaming)


def rules_of(model: nn.Module) -> list[Rule]:
    """Return the rules that transformers applies to the files of a model; models of others have none."""
    found: list[Rule] = get_model_conversion_mapping(model)
    return found
