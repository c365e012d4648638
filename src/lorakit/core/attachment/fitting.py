"""Compare an adapter's tensors with a model: what belongs where, and everything that does not fit.

What is finite in the files must not become infinite in the dtypes of the base.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.build import NewFactor
from lorakit.core.files.inspecting import largest_value
from lorakit.core.files.tensor_names import PREFIX, ROWS, inside, parse
from lorakit.core.layers.modules_to_save import Extras, ModulesToSave, biased_modules, plain_shapes
from lorakit.core.layers.trainable_tokens import ChosenRows
from lorakit.core.model.index import INSIDE, AdapterIndex, TargetWeight
from lorakit.core.model.ties import tied_groups, with_ties
from lorakit.core.model.vocabulary import chosen_rows
from lorakit.core.variants import OwnTensor, variant_at
from lorakit.errors import PatternError, TargetError, nearest
from lorakit.targets import literal_value, resolve, saved_modules

MISSING, UNEXPECTED, SHAPE, UNTIED = "missing", "unexpected", "shape", "untied"
"""The kinds of problems."""


@dataclass(frozen=True)
class Problem:
    """One mismatch between an adapter's files and a model.

    Attributes:
        kind: "missing", "unexpected", "shape" or "untied".
        name: Name of the tensor, or path of the site.
        text: The mismatch in words.
    """

    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass
class Fit:
    """Where an adapter's tensors go.

    Attributes:
        sites: Path on disk -> its place and its parts: "A" (r, in), "B" (out, r), "bias" (out,), and a variant's own
            tensors (…) by `OwnTensor.held_as`.
        saved: Paths of the modules it copies.
        copied: (id of the original module, name inside) -> tensor's name.
        biases: (id of a module, name of the bias) -> tensor's name.
        rows: Rows of tables, each with its tensor's name.
        leaders: Path of a module -> path of the one to which it is tied.
        problems: The mismatches.
    """

    sites: dict[str, tuple[TargetWeight, dict[str, Tensor]]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    copied: dict[tuple[int, str], str] = field(default_factory=dict)
    biases: dict[tuple[int, str], str] = field(default_factory=dict)
    rows: list[tuple[ChosenRows, str]] = field(default_factory=list)
    leaders: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def shape_problems(self) -> bool:
        """Return whether a mismatch is one of shapes, which no allowance overrides."""
        return any(problem.kind == SHAPE for problem in self.problems)

    def outer_paths(self) -> set[str]:
        """Paths in the plain base of the modules that get factors."""
        return {place.outer for place, _ in self.sites.values()}


def fit(
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    index: AdapterIndex,
    bare: Mapping[str, TargetWeight] | None = None,
) -> Fit:
    """Find the place of every tensor.

    Args:
        tensors: Name on disk -> tensor (…).
        config: The adapter's config.
        index: The model's map.
        bare: Path on disk -> place, of the bare parameters that the config names.

    Returns:
        The places, with every mismatch in `problems`.

    Raises:
        TargetError: Rows of tables are named that cannot be trained here.
        ConfigError: Likewise.
    """
    result = Fit()
    left = dict(tensors)
    present: dict[str, dict[str, Tensor]] = {}
    for name in list(left):
        key = parse(name)
        if key is not None and (key.part in OF_EVERY_VARIANT or key.part in _own_parts(config, key.path)):
            present.setdefault(key.path, {})[key.part] = left.pop(name)
    expected, result.saved = _expected(config, index)
    expected = None if expected is None else expected | set(bare or ())
    _find_places(present, index, bare or {}, result)
    _take_copies(left, index, result)
    _take_biases(left, config, index, result)
    _take_rows(left, config, index, result)
    _check_ties(tensors, config, index, result)
    _check_sites(config, expected, result)
    extra = [name for name in left if not _known_extra(name, result)]
    result.problems += [Problem(UNEXPECTED, name, f"unexpected {name}{_prefix_hint(name)}") for name in extra]
    return result


OF_EVERY_VARIANT = {"A", "B", "bias"}
"""Parts of a site that are not a variant's own tensors."""


def _own_parts(config: LoraConfig, path: str) -> dict[str, OwnTensor]:
    """Return the own tensors of the variant that a config asks for at a site, by the part that they are."""
    return {tensor.held_as: tensor for tensor in variant_at(config, path)[0].tensors}


def _expected(config: LoraConfig, index: AdapterIndex) -> tuple[set[str] | None, tuple[str, ...]]:
    """The sites that the config names, or None where only a pattern could tell; and the modules it copies."""
    plain = dataclasses.replace(config, rank_pattern={}, alpha_pattern={})
    only_words = not isinstance(config.target_modules, str) or config.target_modules.lower() == "all-linear"
    if config.target_modules is None and config.target_parameters:
        plain.target_modules = []
    only_words = only_words and plain.target_modules is not None
    if not only_words or isinstance(config.exclude_modules, str):
        plain = dataclasses.replace(plain, target_modules="all-linear", exclude_modules=None, layers_to_transform=None)
        plain.layers_pattern = None
    try:
        found = resolve(index.candidates, plain, allow_partial=True)
    except TargetError:
        saved = saved_modules(index.candidates, plain)[0] if config.target_parameters else ()
        return (set() if only_words else None), tuple(saved)
    if config.ensure_weight_tying:
        found = with_ties(index, plain, found).found
    only_words = only_words and not isinstance(config.exclude_modules, str)
    if not only_words:
        return None, found.saved
    places = [place for m in found.matches for place in index.places(m.path, index.kind(m.kind))]
    return {place.path for place in places}, found.saved


def _find_places(
    present: Mapping[str, dict[str, Tensor]], index: AdapterIndex, bare: Mapping[str, TargetWeight], result: Fit
) -> None:
    kinds = {candidate.path: candidate.kind for candidate in index.candidates}
    inside_first = sorted(present, key=lambda path: (path.partition(INSIDE)[0], -path.count(INSIDE), path))
    for path in inside_first:  # the order in which layers are put around a module
        outer = path.partition(INSIDE)[0]
        places = index.places(outer, index.kind(kinds[outer])) if kinds.get(outer) else []  # type: ignore[arg-type]
        place = bare.get(path) or next((place for place in places if place.path == path), None)
        if place is None:
            text = f"unexpected site {path}{_hint(path, list(kinds))}"
            result.problems.append(Problem(UNEXPECTED, path, text))
        else:
            result.sites[path] = (place, present[path])


def _take_copies(left: dict[str, Tensor], index: AdapterIndex, result: Fit) -> None:
    for path in result.saved:
        module = index.modules[path]
        original = module.original_module if isinstance(module, ModulesToSave) else module
        for leaf, shape in plain_shapes(original).items():
            name = f"{PREFIX}{path}.{leaf}"
            if name not in left:
                result.problems.append(_missing(name))
                continue
            given = left.pop(name)
            _check_shape(name, given, shape, result)
            result.copied[(id(original), leaf)] = name


def _take_biases(left: dict[str, Tensor], config: LoraConfig, index: AdapterIndex, result: Fit) -> None:
    outer = result.outer_paths()
    adapted = (f"{place.outer}.{place.child}" if place.child else place.outer for place, _ in result.sites.values())
    depths = Counter(adapted)
    for path, module, leaves in biased_modules(index.modules, outer, result.saved, config.bias):
        for leaf in leaves:
            # as PEFT writes it; as it does where another adapter has a layer; and as it lies in the plain base
            ways = [inside(path, depths), path + INSIDE * max(1, depths[path]), path]
            names = [f"{PREFIX}{way}.{leaf}" for way in ways]
            name = next((name for name in names if name in left), names[0])
            if name not in left:
                result.problems.append(_missing(name))
                continue
            given = left.pop(name)
            _check_shape(name, given, tuple(module._parameters[leaf].shape), result)  # type: ignore[union-attr]
            result.biases[(id(module), leaf)] = name


def _take_rows(left: dict[str, Tensor], config: LoraConfig, index: AdapterIndex, result: Fit) -> None:
    if config.trainable_token_indices is None:
        return
    for chosen in chosen_rows(index, config, result.outer_paths(), result.saved):
        name = f"{PREFIX}{chosen.path}{ROWS}"
        if name not in left:
            result.problems.append(_missing(name))
            continue
        table: Tensor = index.base(chosen.path)._parameters["weight"]  # type: ignore[assignment]
        _check_shape(name, left.pop(name), (len(chosen.indices), table.shape[1]), result)
        result.rows.append((chosen, name))


def _check_ties(tensors: Mapping[str, Tensor], config: LoraConfig, index: AdapterIndex, result: Fit) -> None:
    """Find what is tied in the file; where the two are not the same there, they cannot become one."""
    if not config.ensure_weight_tying:
        return
    groups = tied_groups(index, {*result.saved, *result.outer_paths()})
    result.leaders = {path: leader for leader, partners in groups.items() for path in partners}
    for path, leader in result.leaders.items():
        pairs = [(f"{PREFIX}{path}.weight", tensors.get(f"{PREFIX}{leader}.weight"))]
        if leader in result.sites:
            embedding = result.sites[leader][1]
            names = ("embedding_A", "embedding_B")
            pairs = [(f"{PREFIX}{path}.lora_{name}", embedding.get(name[-1])) for name in names]
            pairs += [
                (f"{PREFIX}{path}.lora_{part}.weight", embedding[other].T if other in embedding else None)
                for part, other in ("AB", "BA")
            ]
        for name, wanted in pairs:
            if name in tensors and wanted is not None and not same_numbers(tensors[name], wanted):
                text = f"untied {name}: its numbers are not those of {leader}, to which it is tied"
                result.problems.append(Problem(UNTIED, name, text))


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any shape hold the same numbers, whatever their dtypes."""
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def _check_sites(config: LoraConfig, expected: set[str] | None, result: Fit) -> None:
    present = set(result.sites)
    for path in sorted(present):
        if expected is not None and path not in expected:
            text = f"unexpected site {path}: the config does not name it"
            result.problems.append(Problem(UNEXPECTED, path, text))
        _check_parts(config, path, result)
    for path in sorted((expected or set()) - present):
        text = f"missing site {path}: the config names it, and there are no tensors for it"
        result.problems.append(Problem(MISSING, path, text))


def _check_parts(config: LoraConfig, path: str, result: Fit) -> None:
    place, parts = result.sites[path]
    kind, slot = place.kind, place.slot
    names = {
        "A": kind.names[0] + kind.on_disk,
        "B": kind.names[1] + kind.on_disk,
        "bias": f"{kind.names[1]}.bias",
    }
    variant, setting = variant_at(config, path)
    names |= {tensor.held_as: tensor.keys[0].removeprefix(".") for tensor in variant.tensors}
    wanted = {"A", "B"} | {tensor.held_as for tensor in variant.tensors} | ({"bias"} if config.lora_bias else set())
    lacking = sorted(wanted - set(parts))
    result.problems += [_missing(f"{PREFIX}{path}.{names[part]}") for part in lacking]
    extra = [f"{PREFIX}{path}.{names[part]}" for part in sorted(set(parts) - wanted)]
    result.problems += [Problem(UNEXPECTED, name, f"unexpected {name}") for name in extra]
    if lacking:
        del result.sites[path]
        return
    rank = _rank(config, place, kind.rank(slot, tuple(parts["A"].shape)))
    shapes = dict(zip(("A", "B"), variant.shapes_of(kind, slot, rank, setting), strict=True))
    shapes |= {"bias": (slot.out_features,)}
    shapes |= {tensor.held_as: tensor.shape(kind, slot, rank, setting) for tensor in variant.tensors}
    for part in sorted(wanted):
        _check_shape(f"{path}.{names[part]}", parts[part], shapes[part], result)


def _rank(config: LoraConfig, place: TargetWeight, found: int) -> int:
    """The rank that a site must have; where a pattern is not a plain name, any rank that the config mentions.

    A pattern names the module, or one weight of several by its own path: combined adapters have a rank for each.
    """
    try:
        of_module = literal_value(config.rank_pattern, place.pattern_path, config.r)
        return int(literal_value(config.rank_pattern, place.path, of_module))
    except PatternError:
        return found if found in {config.r, *config.rank_pattern.values()} else config.r


def _check_shape(name: str, given: Tensor, wanted: Sequence[int], result: Fit) -> None:
    if tuple(given.shape) != tuple(wanted):
        text = f"{name} has shape {tuple(given.shape)}, {tuple(wanted)} was expected"
        result.problems.append(Problem(SHAPE, name, text))


def _missing(name: str) -> Problem:
    return Problem(MISSING, name, f"missing {name}")


def _known_extra(name: str, result: Fit) -> bool:
    """PEFT adds the base's matrix where embeddings are targeted, that of the head, and biases beside copied modules."""
    if any(f"{path}.{word}." in name for path in result.saved for word in ("original_module", "modules_to_save")):
        return True
    path = name.removeprefix(PREFIX).removesuffix(".base_layer.weight").removesuffix(".token_adapter")
    known = path in result.sites or path.endswith("lm_head") or any(path == chosen.path for chosen, _ in result.rows)
    return name.endswith(".base_layer.weight") and known


def _prefix_hint(name: str) -> str:
    return "" if name.startswith(PREFIX) else f" (names begin with {PREFIX!r} in PEFT's format)"


def _hint(path: str, candidates: list[str]) -> str:
    words = nearest(path, candidates, 1)
    return f" (nearest in this model: {words[0]})" if words else ""


WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes in which a base computes; a weight stored in another one is computed with in fp32."""


def out_of_range(
    tensors: Mapping[str, Tensor],
    largest: Mapping[str, float],
    fitted: Fit,
    index: AdapterIndex,
    factors: Sequence[NewFactor],
    extras: Extras,
) -> list[str]:
    """Return what would be infinite in the base's dtype, in words.

    Args:
        tensors: Name on disk -> tensor (…).
        largest: Name on disk -> its largest magnitude.
        fitted: Where they go.
        index: The model's map.
        factors: The factors that were made of them, in the order of the sites.
        extras: The copies and biases that they fill.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    found = []
    for name, dtype in _uses(names, fitted, index, extras):
        limit = torch.finfo(dtype).max
        if limit < largest[name] < math.inf:
            found.append(f"{name} holds {largest[name]:g}, beyond {_named(dtype)} (at most {limit:g})")
    for new, (place, held) in zip([] if found else factors, fitted.sites.values(), strict=not found):
        dtype, sizes = _dtype_at(index, place), [largest[names[id(held[side])]] for side in "AB"]
        if _product_overflows(new, sizes, torch.finfo(dtype).max):
            found.append(f"scale·B·A at {place.path} is beyond {_named(dtype)}")
    return found


def copied_tensors(extras: Extras, fitted: Fit, index: AdapterIndex) -> Iterator[tuple[Tensor, str]]:
    """Yield each tensor (…) of the saved modules with the name of the tensor that fills it."""
    for path, duplicate in extras.copies.items():
        standing = index.modules[path]
        original = standing.original_module if isinstance(standing, ModulesToSave) else standing
        for leaf, own in duplicate.state_dict(keep_vars=True).items():
            key = fitted.copied.get((id(original), leaf))
            if key is not None:
                yield own, key


def filled_biases(extras: Extras, fitted: Fit) -> Iterator[tuple[nn.Module, str, Tensor, str]]:
    """Yield each trained bias: module, name, the tensor (out,) it has now, name of the tensor that fills it."""
    for module, originals in extras.biases:
        for leaf, old in originals.items():
            key = fitted.biases.get((id(module), leaf))
            if key is not None:
                yield module, leaf, old, key


def _uses(
    names: Mapping[int, str], fitted: Fit, index: AdapterIndex, extras: Extras
) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the name of each tensor with the dtype that its numbers have to fit."""
    for place, parts in fitted.sites.values():
        dtype = _dtype_at(index, place)
        for tensor in parts.values():
            yield names[id(tensor)], dtype
    for own, name in copied_tensors(extras, fitted, index):
        if own.is_floating_point():
            yield name, own.dtype
    for _, _, old, name in filled_biases(extras, fitted):
        yield name, old.dtype
    for chosen, name in fitted.rows:
        yield name, _computed(index.base(chosen.path).weight)


def _dtype_at(index: AdapterIndex, place: TargetWeight) -> torch.dtype:
    return _computed(getattr(index.holder(place), place.slot.parameter, None))


def _computed(weight: object) -> torch.dtype:
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in WIDTHS else torch.float32


def _product_overflows(new: NewFactor, sizes: Sequence[float], limit: float) -> bool:
    """Return whether scale·B·A goes beyond a limit; the product is only made if A and B are as large as that needs."""
    factor, by = new.factor, abs(new.factor.scale)
    most = by * factor.A.shape[0] * math.prod(sizes)
    if factor.A.is_meta or not all(map(math.isfinite, sizes)) or most <= limit:
        return False
    A, B = (half.detach().double() for half in factor.multiplied())
    delta = new.place.kind.delta(new.place.slot, A, B)
    return by * largest_value(delta) > limit


def _named(dtype: torch.dtype) -> str:
    return f"the base's {str(dtype).removeprefix('torch.')}"
