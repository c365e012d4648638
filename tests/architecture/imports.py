"""Rules of imports: layers of the package and of core, third-party packages, cycles, imports by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .reading import (
    Breach,
    Sources,
    import_edges,
    imports,
    module_of,
    modules_of,
    parsed,
    part_of,
    reached,
    rings,
    way_round,
    within,
)

FLOORS = {
    "__init__": -2,
    "errors": -1,
    "allocator": 0,
    "startup": 0,
    "durable": 0,
    "machine": 0,
    "hub_cache": 0,
    "mapped_files": 0,
    "tables": 0,
    "caches": 1,
    "terminal": 1,
    "config": 1,
    "file_hashes": 2,
    "architectures": 1,
    "targets": 2,
}
TORCH_FREE = {*FLOORS, "__main__", "plan", "report"}
FLOORS |= {
    "plan": 3,
    "report": 3,
    "ops": 3,
    "identity": 3,
    "core": 4,
    "hub": 5,
    "data": 6,
    "speed": 6,
    "generate": 6,
    "peft": 6,
}
FLOORS |= {"tasks": 7, "session": 8, "train": 9, "serve": 9, "cli": 10, "__main__": 11}
LOWEST = {
    "torch": 0,
    "safetensors": 0,
    "numpy": 5,
    "pydantic": 5,
}  # packages that several packages import: the lowest layer of each
DOORS = {  # third-party package -> the files or folders that may import it
    "transformers": ("hub",),
    "tokenizers": ("hub",),
    "huggingface_hub": ("hub", "hub_cache.py"),
    "gguf": ("hub",),
    "bitsandbytes": ("core/quantization/bitsandbytes.py", "train/loop/adamw8bit.py"),
    "torchao": ("core/quantization/torchao.py",),
    "hqq": ("core/quantization/hqq.py",),
    "deepspeed": ("core/shards.py",),
    "matplotlib": ("report.py",),
    "datasets": ("data/columnar.py",),
    "pyarrow": ("data/columnar.py",),
    "datasketch": ("data/quality.py",),
    "sentence_transformers": ("tasks/embedding.py",),
    "triton": ("ops/kernels/triton",),
    "tensorboard": ("train/files/trackers.py",),
    "trackio": ("train/files/trackers.py",),
    "wandb": ("train/files/trackers.py",),
    "mlflow": ("train/files/trackers.py",),
    "cyclopts": ("cli",),
    "rich": ("terminal.py", "train/loop/progress.py", "cli"),
    "yaml": ("train/settings/sources.py", "cli"),
}
INNER = {  # folder or file of core -> its layer; its __init__ may import them all
    "clones": 0,
    "shards": 0,
    "kinds": 1,
    "quantization": 1,
    "factor": 2,
    "linalg": 2,
    "inits": 3,
    "variants": 3,
    "routing": 4,
    "layers": 5,
    "model": 6,
    "files": 7,
    "merging": 8,
    "statistics": 8,
    "attachment": 9,
    "operations": 10,
    "optimizers": 10,
    "riemannian": 10,
}
CORE_DOORS = {  # file or folder outside core that may import modules below lorakit.core -> why the public names are not enough
    "peft": "PEFT's interface is written over the layers, the index and the files of an adapter",
    "speed/admission.py": "compares modules and adapted layers by identity",
    "speed/linear.py": "reads the operands of an adapted layer",
    "speed/patching.py": "replaces layers by fused forwards; the rest of speed takes core's hooks and histories from it",
    "generate/prefixes.py": "passes the offsets of a shared prompt in a Route",
    "train/setup/run_adapter.py": "makes, resumes and publishes the adapter of a run",
    "train/processes/sharding.py": "shards the base under the adapter of a run",
    "train/loop/optimizer.py": "steps over the parameter groups of core/optimizers",
}
DYNAMIC_IMPORTS = {  # file that may import lorakit by a name made of strings -> why
    "__init__.py": "the table of the lazy public names",
    "train/__init__.py": "the table of its lazy public names, for --help without torch",
    "peft/paths.py": "the table of PEFT's module paths",
}


def floor_breaches(sources: Sources) -> Iterator[Breach]:
    """Find imports from the same or a higher layer, or through the table of lazy names."""
    for path, tree in parsed(sources):
        part = part_of(path)
        if part not in FLOORS:
            yield Breach(path, part, f"the part {part!r} has no floor; add it to FLOORS")
            continue
        for one in imports(path, tree):
            if one.target == "lorakit":
                for name in one.names:
                    if name != "__version__" and name not in FLOORS:
                        yield Breach(path, name, f"{name} is imported from lorakit, not from its module", one.line)
            for other in _parts_of(one.target, one.names):
                if other != part and FLOORS.get(other, 99) >= FLOORS[part]:
                    message = f"{part} (floor {FLOORS[part]}) imports {other} (floor {FLOORS.get(other)})"
                    yield Breach(path, other, message, one.line)


def door_breaches(sources: Sources) -> Iterator[Breach]:
    """Find third-party packages imported outside the packages that may import them."""
    for path, tree in parsed(sources):
        for one in imports(path, tree):
            package = one.target.split(".")[0]
            if package == "lorakit" or package in sys.stdlib_module_names:
                continue
            if package in LOWEST:
                is_bare = package in ("torch", "safetensors") and part_of(path) in TORCH_FREE
                allowed = FLOORS.get(part_of(path), -2) >= LOWEST[package] and not is_bare
            else:
                allowed = within(path, DOORS.get(package, ()))
            if not allowed:
                yield Breach(path, package, f"{package} is imported outside its door", one.line)


def inner_floor_breaches(sources: Sources) -> Iterator[Breach]:
    """Find imports between two directories of core from the same or a higher inner layer."""
    for path, tree in parsed(sources):
        own = _inner(path)
        if own is None:
            continue
        if own not in INNER:
            yield Breach(path, own, f"core/{own} has no inner floor; add it to INNER")
            continue
        for one in imports(path, tree):
            for target in _core_targets(one.target, one.names, sources):
                other = _inner(target)
                if other is None:
                    yield Breach(path, "lorakit.core", f"core/{own} imports the public names of core", one.line)
                elif other != own and INNER.get(other, 99) >= INNER[own]:
                    message = f"core/{own} (floor {INNER[own]}) imports core/{other} (floor {INNER.get(other)})"
                    yield Breach(path, module_of(target), f"{message}: {module_of(target)}", one.line)


def folder_cycles(sources: Sources) -> Iterator[Breach]:
    """Find folders of core that import one another."""
    edges: dict[str, set[str]] = {}
    for module, targets in import_edges(sources).items():
        words = module.split(".")
        if words[1:2] == ["core"] and len(words) > 2:
            folders = {w[2] for w in (t.split(".") for t in targets) if w[1:2] == ["core"] and len(w) > 2}
            edges.setdefault(words[2], set()).update(folders - {words[2]})
    for ring in rings(edges):
        message = f"folders import one another: {' -> '.join(way_round(ring, edges))} ({len(ring)} in the cycle)"
        yield Breach("core", ", ".join(ring), message)


def import_cycles(sources: Sources) -> Iterator[Breach]:
    """Find modules that import one another; imports for type checkers only do not count.

    An import by `import_module` is named alone, because it would make one cycle of everything between its ends.
    """
    edges = import_edges(sources, at_start=True)
    paths = modules_of(sources)
    for ring in rings(edges):
        yield Breach(paths[ring[0]], ", ".join(ring), " -> ".join(way_round(ring, edges)))
    for path, tree in parsed(sources):
        for one in imports(path, tree):
            if one.dynamic and module_of(path) in reached(one.target, edges):
                yield Breach(path, one.target, f"import_module of {one.target}, which imports this module", one.line)


def dynamic_imports(sources: Sources) -> Iterator[Breach]:
    """Find modules of lorakit imported by a string, outside the files that are tables of names."""
    for path, tree in parsed(sources):
        for one in imports(path, tree):
            if one.dynamic and not within(path, DYNAMIC_IMPORTS):
                message = f"import_module of {one.target}: import it by a statement, or move what it needs down"
                yield Breach(path, one.target, message, one.line)


def core_door_breaches(sources: Sources) -> Iterator[Breach]:
    """Find modules outside core that import below `lorakit.core` and are not in CORE_DOORS."""
    for path, tree in parsed(sources):
        if part_of(path) == "core" or within(path, CORE_DOORS):
            continue
        for one in imports(path, tree):
            for target in _core_targets(one.target, one.names, sources):
                if target != "core/__init__.py":
                    name = module_of(target)
                    yield Breach(path, name, f"{name} is imported outside core; import from lorakit.core", one.line)


def _parts_of(target: str, names: list[str]) -> list[str]:
    words = target.split(".")
    if words[0] != "lorakit":
        return []
    return words[1:2] or [name for name in names if name in FLOORS]


def _inner(path: str) -> str | None:
    """Return the folder or stem below core that a path belongs to; None outside core, and for core's `__init__`."""
    words = path.removesuffix(".py").split("/")
    return words[1] if words[0] == "core" and words[1:] not in ([], ["__init__"]) else None


def _core_targets(target: str, names: list[str], sources: Sources) -> list[str]:
    """Return the files of core that an import refers to, as paths; a file that does not exist counts as a module."""
    words = target.split(".")
    if words[:2] == ["lorakit"] and "core" in names:
        return ["core/__init__.py"]
    if words[:2] != ["lorakit", "core"]:
        return []
    modules = modules_of(sources)
    inner = [f"{target}.{name}" for name in names if f"{target}.{name}" in modules]
    inner += [f"lorakit.core.{name}" for name in names if len(words) == 2 and _inner(f"core/{name}") in INNER]
    found = [*dict.fromkeys(inner)]
    if len(found) < len(names) or not names:
        found.append(target)
    return [modules.get(module) or _as_path(module) for module in found]


def _as_path(module: str) -> str:
    path = "/".join(module.split(".")[1:])
    return "core/__init__.py" if path == "core" else f"{path}.py"
