"""Match an adapter's tensors to a model: find the site of each tensor, and list everything that does not match.

This module also checks that finite values in the files do not become infinite when they are converted to the base's
dtypes.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.build import NewFactor
from lorakit.core.files.inspecting import largest_value
from lorakit.core.files.tensors import inside, parse, part_names
from lorakit.core.layers.modules_to_save import Extras, ModulesToSave, biased_modules, plain_shapes
from lorakit.core.layers.trainable_tokens import ChosenRows
from lorakit.core.model.index import INSIDE, AdapterIndex, TargetWeight
from lorakit.core.model.ties import tied_groups, with_ties
from lorakit.core.model.vocabulary import chosen_rows
from lorakit.core.variants import variant_at
from lorakit.errors import PatternError, TargetError, nearest
from lorakit.targets.patterns import literal_value
from lorakit.targets.resolving import ALL_LINEAR, Resolution, resolve, saved_modules
from lorakit.tensor_headers import PREFIX, ROWS

MISSING, UNEXPECTED, SHAPE, UNTIED = "missing", "unexpected", "shape", "untied"
"""Kinds of mismatches between an adapter's files and a model."""


@dataclass(frozen=True)
class Problem:
    """One mismatch between an adapter's files and a model.

    Attributes:
        kind: "missing", "unexpected", "shape" or "untied".
        name: Name of the mismatched tensor, or path of the mismatched site.
        text: The message for the user.
    """

    kind: str
    name: str
    text: str


@dataclass
class Fit:
    """Assignment of an adapter's tensors to the sites and other parts of a model.

    Attributes:
        sites: Path on disk -> the site and a dict from `Key.part` to tensor name.
        saved: Paths of the saved modules; `copied_tensors` yields the names of their tensors.
        biases: Trained biases as (module, parameter name, tensor name) tuples.
        rows: The tokens selected in each embedding, with the name of the tensor that holds their rows.
        tied: Path of a tied module -> path of the module whose weight it shares.
    """

    sites: dict[str, tuple[TargetWeight, dict[str, str]]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    biases: list[tuple[nn.Module, str, str]] = field(default_factory=list)
    rows: list[tuple[ChosenRows, str]] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def outer_paths(self) -> set[str]:
        """Return the paths, in the plain base, of the modules that receive factors."""
        return {target.outer for target, _ in self.sites.values()}

    def take(self, left: dict[str, Tensor], names: Sequence[str], shape: Sequence[int]) -> str | None:
        """Take a tensor with one of several names, and record a mismatch if it is missing or has another shape.

        `left` has the tensors (…) that have not been taken yet; a matching one is removed, and its name is returned. If
        it is missing, the message gives the first name, and None is returned.
        """
        name = next((name for name in names if name in left), None)
        if name is None:
            self.add(MISSING, names[0], f"missing {names[0]}")
        else:
            self.check_shape(name, left.pop(name), shape)
        return name

    def add(self, kind: str, name: str, text: str) -> None:
        """Record a mismatch."""
        self.problems.append(Problem(kind, name, text))

    def check_shape(self, name: str, given: Tensor, wanted: Sequence[int]) -> None:
        """Record a mismatch if a tensor (any shape) does not have the expected shape."""
        if tuple(given.shape) != tuple(wanted):
            self.add(SHAPE, name, f"{name} has shape {tuple(given.shape)}, expected {tuple(wanted)}")


def fit(
    tensors: Mapping[str, Tensor], config: LoraConfig, index: AdapterIndex, bare: Mapping[str, TargetWeight]
) -> Fit:
    """Find the site of every tensor, and collect all mismatches in `problems`.

    Args:
        tensors: Name on disk -> tensor (…).
        config: The adapter's config.
        index: The model's index.
        bare: Path on disk -> site, for the parameters that `target_parameters` names.

    Raises:
        TargetError: The config names an embedding that is missing or cannot be trained.
        ConfigError: Token indices are not valid for their embedding, or conflict with weight tying.
    """
    result = Fit()
    left = dict(tensors)
    present: dict[str, dict[str, str]] = {}
    for name in tensors:
        key = parse(name)
        if key is not None and key.part in _possible_parts(config, key.path):
            present.setdefault(key.path, {})[key.part] = name
            del left[name]
    expected, result.saved = _expected(config, index)
    _find_sites(present, index, bare, result)
    _take_extras(left, config, index, result)
    _check_ties(tensors, config, index, result)
    _check_sites(tensors, config, None if expected is None else expected | set(bare), result)
    for name in left:
        if not _known_extra(name, result):
            hint = "" if name.startswith(PREFIX) else f" (names begin with {PREFIX!r} in PEFT's format)"
            result.add(UNEXPECTED, name, f"unexpected {name}{hint}")
    return result


def _possible_parts(config: LoraConfig, path: str) -> set[str]:
    """Return every `Key.part` that a site can have: A, B, the bias of B, and the extra tensors of its variant."""
    return {"A", "B", "bias"} | {tensor.held_as for tensor in variant_at(config, path)[0].parts.extras}


def _expected(config: LoraConfig, index: AdapterIndex) -> tuple[set[str] | None, tuple[str, ...]]:
    """Return the paths of a config's sites (None if they depend on a pattern) and of its saved modules."""
    plain = config.with_fields(rank_pattern={}, alpha_pattern={})
    named = config.target_modules
    if named is None and config.target_parameters:
        plain.target_modules = named = []
    has_pattern = isinstance(named, str) and named.lower() != ALL_LINEAR
    is_known = named is not None and not has_pattern and not isinstance(config.exclude_modules, str)
    resolution = Resolution((), tuple(saved_modules(index.candidates, plain)[0]), (), ())
    if is_known:
        with contextlib.suppress(TargetError):  # no module matches
            resolution = resolve(index.candidates, plain, allow_partial=True)
    if config.ensure_weight_tying:
        resolution, _ = with_ties(index, plain, resolution)
    targets = [target for m in resolution.matches for target in index.targets(m.path, index.kind(m.kind))]
    return {target.path for target in targets} if is_known else None, resolution.saved


def _find_sites(
    present: Mapping[str, dict[str, str]], index: AdapterIndex, bare: Mapping[str, TargetWeight], result: Fit
) -> None:
    kinds = {candidate.path: candidate.kind for candidate in index.candidates}
    inside_first = sorted(present, key=lambda path: (path.partition(INSIDE)[0], -path.count(INSIDE), path))
    for path in inside_first:  # layers are wrapped around a module from the inside out
        outer = path.partition(INSIDE)[0]
        kind = kinds.get(outer)
        targets = index.targets(outer, index.kind(kind)) if kind else []
        target = bare.get(path) or next((target for target in targets if target.path == path), None)
        if target is None:
            near = nearest(path, list(kinds), 1)
            hint = f" (nearest in this model: {near[0]})" if near else ""
            result.add(UNEXPECTED, path, f"unexpected site {path}{hint}")
        else:
            result.sites[path] = (target, present[path])


def _take_extras(left: dict[str, Tensor], config: LoraConfig, index: AdapterIndex, result: Fit) -> None:
    """Assign the tensors of saved modules, trained biases and trained token embeddings to their places in the model."""
    for path in result.saved:
        module = index.modules[path]
        original = module.original_module if isinstance(module, ModulesToSave) else module
        for leaf, shape in plain_shapes(original).items():
            result.take(left, [f"{PREFIX}{path}.{leaf}"], shape)
    outer = result.outer_paths()
    depths = Counter(f"{target.outer}.{target.child}".removesuffix(".") for target, _ in result.sites.values())
    for path, module, leaves in biased_modules(index.modules, outer, result.saved, config.bias):
        # the path in PEFT's files, the path if another adapter wrapped the module too, and the path in the plain base
        paths = [inside(path, depths), path + INSIDE * max(1, depths[path]), path]
        for leaf in leaves:
            names = [f"{PREFIX}{way}.{leaf}" for way in paths]
            bias = result.take(left, names, module.get_parameter(leaf).shape)
            if bias is not None:
                result.biases.append((module, leaf, bias))
    named = [] if config.trainable_token_indices is None else chosen_rows(index, config, outer, result.saved)
    for chosen in named:
        width = index.base(chosen.path).get_parameter("weight").shape[1]
        rows = result.take(left, [f"{PREFIX}{chosen.path}{ROWS}"], (len(chosen.indices), width))
        if rows is not None:
            result.rows.append((chosen, rows))


def _check_ties(tensors: Mapping[str, Tensor], config: LoraConfig, index: AdapterIndex, result: Fit) -> None:
    """Find the modules that share a weight, and record a mismatch if the file has different values for them."""
    if not config.ensure_weight_tying:
        return
    groups = tied_groups(index, {*result.saved, *result.outer_paths()})
    result.tied = {path: leader for leader, partners in groups.items() for path in partners}
    for path, leader in result.tied.items():
        pairs = [(f"{PREFIX}{path}.weight", tensors.get(f"{PREFIX}{leader}.weight"))]
        if leader in result.sites:
            embedding = {part: tensors[name] for part, name in result.sites[leader][1].items()}
            names = ("embedding_A", "embedding_B")
            pairs = [(f"{PREFIX}{path}.lora_{name}", embedding.get(name[-1])) for name in names]
            pairs += [
                (f"{PREFIX}{path}.lora_{part}.weight", embedding[other].T if other in embedding else None)
                for part, other in ("AB", "BA")
            ]
        for name, wanted in pairs:
            if name in tensors and wanted is not None and not _same_values(tensors[name], wanted):
                text = f"untied {name}: its values differ from those of {leader}, although the modules share a weight"
                result.add(UNTIED, name, text)


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape and values, regardless of dtype."""
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def _check_sites(tensors: Mapping[str, Tensor], config: LoraConfig, expected: set[str] | None, result: Fit) -> None:
    present = sorted(result.sites)
    for path in present:
        if expected is not None and path not in expected:
            result.add(UNEXPECTED, path, f"unexpected site {path}: the config does not name it")
        _check_parts(tensors, config, path, result)
    for path in sorted((expected or set()).difference(present)):
        result.add(MISSING, path, f"missing site {path}: the config names it, but the file has no tensors for it")


def _check_parts(tensors: Mapping[str, Tensor], config: LoraConfig, path: str, result: Fit) -> None:
    target, parts = result.sites[path]
    kind, spec = target.kind, target.spec
    variant, setting = variant_at(config, path)
    names = part_names(kind, variant)
    wanted = _possible_parts(config, path) - (set() if config.lora_bias else {"bias"})
    for part in sorted(wanted - set(parts)):
        name = f"{PREFIX}{path}.{names[part]}"
        result.add(MISSING, name, f"missing {name}")
    for part in sorted(set(parts) - wanted):
        result.add(UNEXPECTED, parts[part], f"unexpected {parts[part]}")
    if not wanted <= set(parts):
        del result.sites[path]
        return
    rank = _rank(config, target, kind.rank(spec, tuple(tensors[parts["A"]].shape)))
    shapes = dict(zip(("A", "B"), variant.shapes_of(kind, spec, rank, setting, path), strict=True))
    shapes |= {"bias": (spec.out_features,)}
    shapes |= {tensor.held_as: tensor.shape(kind, spec, rank, setting) for tensor in variant.parts.extras}
    for part in sorted(wanted):
        result.check_shape(f"{path}.{names[part]}", tensors[parts[part]], shapes[part])


def _rank(config: LoraConfig, target: TargetWeight, in_file: int) -> int:
    """Return the expected rank of a site.

    If any key of `rank_pattern` is a regular expression, the result is `in_file` if the config contains that rank, and
    `config.r` otherwise. Keys are paths of modules or, in combined adapters (where the weights of one module can have
    different ranks), of single weights.
    """
    try:
        of_module = literal_value(config.rank_pattern, target.pattern_path, config.r)
        return int(literal_value(config.rank_pattern, target.path, of_module))
    except PatternError:
        return in_file if in_file in {config.r, *config.rank_pattern.values()} else config.r


def _known_extra(name: str, result: Fit) -> bool:
    """Return whether a tensor is a base weight (of a saved module, adapted module or head) that PEFT also saves."""
    if any(f"{path}.{word}." in name for path in result.saved for word in ("original_module", "modules_to_save")):
        return True
    path = name.removeprefix(PREFIX).removesuffix(".base_layer.weight").removesuffix(".token_adapter")
    known = path in result.sites or path.endswith("lm_head") or any(path == chosen.path for chosen, _ in result.rows)
    return name.endswith(".base_layer.weight") and known


WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Possible compute dtypes of a base; weights in other dtypes are converted to fp32 for computation."""


def out_of_range(
    tensors: Mapping[str, Tensor],
    largest: Mapping[str, float],
    fitted: Fit,
    index: AdapterIndex,
    factors: Sequence[NewFactor],
    auxiliary: Extras,
) -> list[str]:
    """Return messages about values that would overflow to infinity in the base's dtype.

    The product scale·B·A is checked only if the base's dtype has a smaller range than fp32, in which adapters are
    trained: a forward pass does not compute the product, and a merge checks its own result.

    Args:
        tensors: Name on disk -> tensor (…).
        largest: Name on disk -> largest magnitude in the tensor.
        fitted: The assignment of the tensors to sites.
        index: The model's index.
        factors: The factors built from the tensors, in the order of the sites.
        auxiliary: The saved modules that take their values from the tensors.
    """
    messages = []
    for name, dtype in _uses(tensors, fitted, index, auxiliary):
        limit = torch.finfo(dtype).max
        if limit < largest[name] < math.inf:
            messages.append(
                f"{name} contains {largest[name]:g}, which is outside the range of {_named(dtype)} (up to {limit:g})"
            )
    for new, (target, names) in zip([] if messages else factors, fitted.sites.values(), strict=not messages):
        dtype, sizes = _dtype_at(index, target), [largest[names[side]] for side in "AB"]
        limit = torch.finfo(dtype).max
        if limit < torch.finfo(torch.float32).max and _product_overflows(new, sizes, limit):
            messages.append(f"scale·B·A at {target.path} is outside the range of {_named(dtype)}")
    return messages


def copied_tensors(auxiliary: Extras, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, str]]:
    """Yield each tensor (…) in the saved modules, with the name of the tensor on disk that supplies its values."""
    for path, duplicate in auxiliary.copies.items():
        for leaf, own in duplicate.state_dict(keep_vars=True).items():
            name = f"{PREFIX}{path}.{leaf}"
            if name in tensors:
                yield own, name


def _uses(
    tensors: Mapping[str, Tensor], fitted: Fit, index: AdapterIndex, auxiliary: Extras
) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the name of each tensor and the dtype in which the model uses its values."""
    for target, names in fitted.sites.values():
        yield from ((name, _dtype_at(index, target)) for name in names.values())
    for own, name in copied_tensors(auxiliary, tensors):
        if own.is_floating_point():
            yield name, own.dtype
    for module, leaf, name in fitted.biases:
        yield name, module.get_parameter(leaf).dtype
    for chosen, name in fitted.rows:
        yield name, _computed(index.base(chosen.path).get_parameter("weight"))


def _dtype_at(index: AdapterIndex, target: TargetWeight) -> torch.dtype:
    return _computed(getattr(index.holder(target), target.spec.parameter, None))


def _computed(weight: Tensor | nn.Module | None) -> torch.dtype:
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in WIDTHS else torch.float32


def _product_overflows(new: NewFactor, sizes: Sequence[float], limit: float) -> bool:
    """Return whether any entry of scale·B·A exceeds a limit; B·A is computed only if A and B contain large values."""
    factor, by = new.factor, abs(new.factor.scale)
    most = by * factor.A.shape[0] * math.prod(sizes)
    if factor.A.is_meta or not all(map(math.isfinite, sizes)) or most <= limit:
        return False
    A, B = (matrix.detach().double() for matrix in factor.multiplied())
    delta = new.target.kind.delta(new.target.spec, A, B)
    return by * largest_value(delta) > limit


def _named(dtype: torch.dtype) -> str:
    return f"the base's {str(dtype).removeprefix('torch.')}"
