"""Rank and alpha of a site on disk, as far as the files tell them without a model.

The files name modules, not their bare parameters: which tensors are whose follows from the order in which the module
defines them, and that is known where the model is.
"""

from __future__ import annotations

from lorakit.config import LoraConfig
from lorakit.core.files.adapter_folder import AdapterFiles
from lorakit.core.files.patterns import literal_value
from lorakit.core.layering.sitemap import INSIDE
from lorakit.errors import PatternError
from lorakit.targets import names_path


def rank_and_alpha(files: AdapterFiles, path: str, rows: int) -> tuple[int, float | None]:
    """Rank and alpha of a site; where it cannot be known, the rows for the rank and None for alpha.

    Of an adapter that PEFT wrote, a parameter's own rank and alpha are known where the patterns give all parameters
    that may be meant the same.

    Args:
        files: What was read.
        path: The site's path on disk.
        rows: So many rows has its A: the rank, or of experts the rank of all together.
    """
    config = files.config
    known = files.sidecar.sites.get(path) if files.config_is_ours else None
    if known is not None:
        rank = int(known["r"])
        return (rank if rank > 0 and rows % rank == 0 else rows), float(known["lora_alpha"])
    meant = parameters_meant(config, path)
    try:
        ranks = {int(literal_value(config.rank_pattern, name, config.r)) for name in meant} or {rows}
        alphas = {float(literal_value(config.alpha_pattern, name, config.lora_alpha)) for name in meant or [path]}
    except PatternError:
        return rows, None
    fitting = [rank for rank in ranks if rank > 0 and rows % rank == 0]
    if len(fitting) != 1 or len(alphas) != 1:
        return rows, None
    return fitting[0], alphas.pop()


def parameters_meant(config: LoraConfig, path: str) -> tuple[str, ...]:
    """The bare parameters that a site on disk may belong to, sorted; none where the module itself is a target.

    Args:
        config: The adapter's config.
        path: The site's path on disk.
    """
    module, targets = path.partition(INSIDE)[0], config.target_modules
    if not isinstance(targets, str) and any(names_path(entry, module) for entry in targets or ()):
        return ()
    parts = [entry.rpartition(".") for entry in config.target_parameters or ()]
    found = {f"{module}.{name}" for holder, _, name in parts if not holder or names_path(holder, module)}
    return tuple(sorted(found))
