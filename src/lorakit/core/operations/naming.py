"""Which sites of several adapters are one, and what a config says so that it names the sites of a result.

On disk a bare parameter has the path of its module, and of several the one that is defined last lies outermost; so one
path can mean different parameters in two adapters. Knows configs, paths and ranks, nothing of numbers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lorakit.config import LoraConfig
from lorakit.core.layering.sitemap import INSIDE
from lorakit.core.operations.loose import PLAIN_TARGETS, LooseAdapter, LooseFactor, outer_modules
from lorakit.core.operations.lowrank import padded
from lorakit.errors import AdapterError

_Parameter = tuple[int, tuple[str, ...]]
"""Order of definition, and what it may be called."""


def aligned(adapters: Sequence[LooseAdapter]) -> dict[str, list[LooseFactor | None]]:
    """The sites of several adapters together: path on disk of one that has them all -> each adapter's factor, or None.

    Args:
        adapters: Of one base.

    Raises:
        AdapterError: They name different parameters of a module, and it is not known which of them is defined first;
            or one adapts the whole of a module of which another names a parameter.
    """
    modules: dict[str, list[LooseFactor | None]] = {}
    bare: dict[str, dict[_Parameter, list[LooseFactor | None]]] = {}
    for number, adapter in enumerate(adapters):
        for path, factor in adapter.factors.items():
            if factor.bare is not None:
                inside = bare.setdefault(path.partition(INSIDE)[0], {})
                here = inside.setdefault((factor.bare.order, factor.bare.names), [None] * len(adapters))
            else:
                here = modules.setdefault(path, [None] * len(adapters))
            here[number] = factor
    whole = {path.partition(INSIDE)[0] for path in modules}
    for module, inside in bare.items():
        if module in whole:
            raise AdapterError(f"One adapter sits at {module}, and another at a parameter of it (target_parameters).")
        _check_told_apart(module, inside)
        for depth, key in enumerate(sorted(inside, reverse=True)):
            modules[module + INSIDE * depth] = inside[key]
    return dict(sorted(modules.items()))


def described(
    config: LoraConfig, factors: Mapping[str, LooseFactor], targets: set[str] | str | None = None
) -> tuple[LoraConfig, dict[str, LooseFactor]]:
    """A config for factors whose scale is 1, whatever their ranks: it says of every site what lies there.

    Args:
        config: All that has nothing to do with rank, scale and modules.
        factors: Path on disk -> factor.
        targets: What `target_modules` says, or None for the paths.

    Returns:
        A config without rsLoRA in which alpha equals the rank everywhere, so that any reader gets scale 1; and the
        factors, with one rank for parameters of one module that files cannot tell apart.
    """
    factors = _evened(factors)
    ranks = {name: factor.r for path, factor in factors.items() for name in factor.names or (path,)}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {_anchored(name, ranks): r for name, r in ranks.items() if r != usual}
    narrowed = {} if targets is not None else PLAIN_TARGETS
    made = dataclasses.replace(
        config,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        init_lora_weights=True,
        target_modules=outer_modules(factors) if targets is None else targets,
        **narrowed,
    )
    return made, factors


def common_targets(adapters: Sequence[LooseAdapter]) -> set[str] | str | None:
    """What names exactly the modules of some adapters together, in their configs' words; None where only paths do.

    Args:
        adapters: Of one base.
    """
    first, *rest = (adapter.config for adapter in adapters)
    said = ("target_modules", *PLAIN_TARGETS)
    if all(getattr(first, name) == getattr(config, name) for config in rest for name in said):
        return _modules_named(first)
    found: set[str] = set()
    for config in (first, *rest):
        narrowed, known = any(getattr(config, name) is not None for name in PLAIN_TARGETS), _modules_named(config)
        if narrowed or not isinstance(known, set):
            return None
        found |= known
    return found


def _modules_named(config: LoraConfig) -> set[str] | str | None:
    """What `target_modules` says; on disk, none beside bare parameters means no module."""
    named = config.target_modules
    if named is None or isinstance(named, str):
        return set() if named is None and config.target_parameters else named
    return set(named)


def _check_told_apart(module: str, inside: Iterable[_Parameter]) -> None:
    orders, names = [order for order, _ in inside], {names for _, names in inside}
    known = len(set(orders)) == len(orders) and all(len(one) == 1 for one in names)
    if not known and len(names) > 1:
        raise AdapterError(
            f"The adapters sit on different parameters of {module} ({', '.join(sorted(set().union(*names)))}), and "
            "files do not say which of them is defined first. Load the adapters onto their model, and do it there."
        )


def _evened(factors: Mapping[str, LooseFactor]) -> dict[str, LooseFactor]:
    """The largest rank, filled with zeros, wherever a pattern cannot name one parameter and not another."""
    largest: dict[tuple[str, ...], int] = {}
    for factor in factors.values():
        if len(factor.names) > 1:
            largest[factor.names] = max(factor.r, largest.get(factor.names, 0))
    return {
        path: factor.holding(padded(factor.product(), largest[factor.names]), factor.scale)
        if factor.r < largest.get(factor.names, 0)
        else factor
        for path, factor in factors.items()
    }


def _anchored(path: str, paths: Mapping[str, int]) -> str:
    """A pattern that names one path and no other: some path may end with another."""
    ambiguous = any(other.endswith("." + path) for other in paths)
    return "^" + path.replace(".", r"\.") if ambiguous else path
