"""Generate `src/lorakit/architectures/known_forwards.json`: the source in transformers that fused forwards equal.

    python scripts/known_forwards.py WHEEL… [--with FOLDER…]   # wheels of transformers; nothing is installed
    python scripts/known_forwards.py --installed               # the installed release alone

Each wheel is unpacked into a temporary folder and imported from there in a process of its own. There, a small model of
every architecture is built, and the source that its modules run is identified. New source is accelerated without the
table, and outputs and gradients are compared with those of the plain model. Source enters the table only if they agree.
`--with` names folders with the packages that an older release needs (`pip install --target FOLDER "huggingface_hub<2"
"tokenizers<0.23"`); they are tried in turn.

The releases that are given are generated again; the others in the file are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "src" / "lorakit" / "architectures" / "known_forwards.json"
BOUND = 5e-5
"""Largest relative difference of outputs and gradients, in float32."""

TIMES = 2
"""Maximum number of architectures in which a digest is compared."""


def main() -> None:
    """Generate the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--with", dest="folders", nargs="*", type=Path, default=[])
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--read", action="store_true", help="print what the importable release contains, as JSON")
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read_release()))
        return
    found = [read_in_process([])] if given.installed else []
    for wheel in given.wheels:
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(wheel).extractall(folder)
            found.append(first_that_runs(Path(folder), [[], *([one] for one in given.folders)]))
    table = merged(json.loads(TABLE.read_text()) if TABLE.exists() else {}, found)
    TABLE.write_text(text_of(table), encoding="utf-8")
    print(f"{len(table['forwards'])} digests, {len(table['releases'])} releases -> {TABLE.relative_to(ROOT)}")


def text_of(table: dict[str, Any]) -> str:
    """Return the table as JSON with one line per function and digest, so that changes to it can be reviewed."""
    parts = [f' "releases": {json.dumps(table["releases"])}']
    for name in ("functions", "forwards"):
        rows = [
            f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(table[name].items())
        ]
        parts.append(f' "{name}": {{\n' + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def first_that_runs(folder: Path, choices: list[list[Path]]) -> dict[str, Any]:
    """Return what an unpacked release contains, imported with the first choice of other packages that works."""
    for others in choices:
        try:
            return read_in_process([folder, *others])
        except subprocess.CalledProcessError as failed:
            error = failed
    raise SystemExit(error.stderr)


def read_in_process(paths: list[Path]) -> dict[str, Any]:
    """Return what the release at the given import paths contains; before them come this repository and its `src`."""
    path = os.pathsep.join(map(str, [ROOT, ROOT / "src", *(one.resolve() for one in paths)]))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--read"]
    made = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    print(f"{result['release']}: {len(result['forwards'])} digests, {len(result['differs'])} differ", file=sys.stderr)
    for name, why in result["differs"].items():
        print(f"  {name}: {why}", file=sys.stderr)
    return result


def merged(table: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the table with the given releases generated again."""
    new = {one["release"] for one in found}
    names: dict[str, list[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for digest, row in table.get("forwards", {}).items():
        kept = [release for release in row["releases"] if release not in new]
        if kept:
            rows[digest] = row | {"releases": kept}
    for one in found:
        for digest, row in one["forwards"].items():
            old = rows.setdefault(digest, {"roles": [], "classes": [], "functions": [], "releases": []})
            rows[digest] = {
                "roles": sorted({*old["roles"], *row["roles"]}),
                "classes": sorted({*old["classes"], *row["classes"]}),
                "functions": sorted(row["functions"]),
                "releases": sorted({*old["releases"], one["release"]}, key=version),
            }
        names |= one["functions"]
    used = {name for row in rows.values() for name in row["functions"]}
    functions = {name: value for name, value in (table.get("functions", {}) | names).items() if name in used}
    releases = sorted({release for row in rows.values() for release in row["releases"]}, key=version)
    return {"releases": releases, "functions": functions, "forwards": rows}


def version(release: str) -> tuple[int, ...]:
    """Return a release as numbers."""
    return tuple(int(part) for part in release.split(".") if part.isdigit())


Found = tuple[Any, str, str]
"""Identity, name and role of source that agrees."""


def read_release() -> dict[str, Any]:
    """Return what the importable release contains: digests whose fused forwards agree, and what differs."""
    import transformers
    from tests.speed.architectures import architectures, small

    from lorakit.identity.identities import Identities

    identities = Identities()
    rows: dict[str, dict[str, set[str]]] = defaultdict(lambda: {"roles": set(), "classes": set(), "functions": set()})
    functions: dict[str, str] = {}
    differs: dict[str, str] = {}
    compared: Counter[tuple[str, str]] = Counter()
    for kind, name in {one.kind: one for one in reversed(list(architectures()))}.values():  # its classes share layers
        try:
            model = small(kind, name)
            model.get_input_embeddings().weight  # noqa: B018 - `answers` needs its gradient
        except Exception:  # noqa: BLE001 - not every architecture can be built small
            continue
        found: list[Found] = []
        for part_of_model in (experts_of, fused_of):
            try:
                found += part_of_model(model, identities, compared)
            except Exception as failed:  # noqa: BLE001 - reported, and not in the table
                differs[name] = f"{type(failed).__name__}: {failed}"[:200]
        for identity, kind_name, role in found:
            if not identity.functions:
                continue
            row = rows[identity.digest]
            row["roles"].add(role)
            row["classes"].add(kind_name)
            row["functions"] |= set(identity.functions.values())
            functions |= {own: function.rpartition(":")[2] for function, own in identity.functions.items()}
    listed = {digest: {key: sorted(value) for key, value in row.items()} for digest, row in rows.items()}
    return {"release": transformers.__version__, "functions": functions, "forwards": listed, "differs": differs}


def fused_of(model: Any, identities: Any, compared: Counter[tuple[str, str]]) -> list[Found]:
    """Return what the fused forwards of a small model replace, if they agree.

    Args:
        model: The model.
        identities: What each module computes.
        compared: How often each digest has been compared in each role; updated.

    Raises:
        ValueError: They do not agree.
    """
    from lorakit.architectures.known_forwards import MODEL
    from lorakit.speed.acceleration import FUSED_FORWARDS
    from lorakit.speed.admission import Known, candidates

    modules = {path: module for path, module in model.named_modules() if path}
    wanted, _ = candidates(modules, FUSED_FORWARDS, Known(identities, None))
    found = [(identities.of(module), named(type(module)), role) for module, role in roles_of(wanted.values())]
    found.append((identities.of_forward(type(model)), named(type(model)), MODEL))
    if all(compared[one.digest, role] >= (1 if role == MODEL else TIMES) for one, _, role in found if one.functions):
        return found[:-1]
    error, of_loss = compare(model, identities)
    if not error <= BOUND:
        raise ValueError(f"{error:.1e}")
    compared.update({(one.digest, role) for one, _, role in found})
    return found[:-1] + of_loss


def experts_of(model: Any, identities: Any, compared: Counter[tuple[str, str]]) -> list[Found]:
    """Return the fused experts of a small model that agree with `experts_forward`, and their activations.

    Args:
        model: The model.
        identities: What each module computes.
        compared: How often each digest has been compared in each role; updated.

    Raises:
        ValueError: They do not agree.
    """
    from lorakit.architectures.known_forwards import PART
    from lorakit.core.layers.experts import IMPLEMENTATIONS, has_marks, role_of

    found: list[Found] = []
    for module in {type(one): one for one in model.modules() if has_marks(one)}.values():
        identity, role = identities.of(module), role_of(module)
        found.append((identity, named(type(module)), role))
        activation = module._modules.get("act_fn")
        if activation is not None:
            found.append((identities.of(activation), named(type(activation)), PART))
        if compared[identity.digest, role] < TIMES:
            for implementation in IMPLEMENTATIONS:
                error = max(map(difference, *answers_of_experts(module, implementation)))
                if not error <= BOUND:
                    raise ValueError(f"experts, {implementation}: {error:.1e}")
            compared[identity.digest, role] += 1
    return found


def answers_of_experts(module: Any, implementation: str) -> tuple[list[Any], list[Any]]:
    """Return outputs and gradients of experts with adapters: with factors at the tokens, and with dense weights."""
    import torch

    from lorakit.core.clones import clone_with
    from lorakit.core.layers.experts import experts_forward, projections
    from lorakit.core.variants import Factor, variant_named

    torch.manual_seed(0)
    scale, tokens, top = 0.7, 11, 2
    module.config._experts_implementation = implementation
    for parameter in module.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter)  # large enough for activations that are clamped
    linears = projections(module)
    experts, width = len(module.down_proj), next(iter(linears.values())).in_features
    factors, dense, leaves = {}, {}, []
    for name, linear in linears.items():
        A = torch.randn(experts, 3, linear.in_features, requires_grad=True)
        B = torch.randn(experts, linear.out_features, 3, requires_grad=True)
        factors[name] = [Factor(A, B, scale, torch.nn.Identity(), variant_named("plain"))]
        dense[name] = linear.W + scale * ((B @ A).mT if linear.in_first else B @ A)
        leaves += [A, B]
    x = torch.randn(tokens, width, requires_grad=True)
    index = torch.stack([torch.randperm(experts)[: min(top, experts)] for _ in range(tokens)])
    weights = torch.rand(index.shape, requires_grad=True)
    leaves += [x, weights]

    def answer(run: Any, *given: Any) -> list[Any]:
        y = run(*given, x, index, weights)
        slope = torch.linspace(-1, 1, y.numel()).view(y.shape)
        return [y.detach(), *torch.autograd.grad((y * slope).sum(), leaves)]

    return answer(experts_forward, module, factors), answer(clone_with(module, dense))


def roles_of(parts: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Yield (module, role) for each fused module and each module that its fused forward bypasses."""
    fused = {id(part.module) for part in parts}
    for part in parts:
        name = part.fused_forward.name
        if name not in ("adapted linear", "dropout"):
            yield part.module, name
            inside = [child for path, child in part.module.named_children() if path not in part.bound.called]
            yield from ((one, "part") for child in inside for one in child.modules() if id(one) not in fused)


def compare(model: Any, identities: Any) -> tuple[float, list[tuple[Any, str, str]]]:
    """Compare a plain model with the accelerated model, with and without logits.

    Norms and biases get distinct values.

    Returns:
        The largest relative difference, and (identity, name, role) of what the loss without logits relies on.
    """
    import torch

    from lorakit.architectures.known_forwards import LOSS, MODEL
    from lorakit.speed.acceleration import accelerate_known, models_above
    from lorakit.speed.admission import Known

    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    plain = answers(model)
    acceleration = accelerate_known(model, Known(identities, None), logits=True, keep_feed_forward=True)
    ours = answers(model)
    acceleration.undo()
    error = max(map(difference, ours, plain), default=0.0)
    if acceleration.head is None:
        return error, []
    try:
        plain = losses(model)
    except Exception:  # noqa: BLE001 - the model has no next-token loss
        return error, []
    acceleration = accelerate_known(model, Known(identities, None), logits=False, keep_feed_forward=True)
    ours = losses(model)
    loss, last = acceleration.loss, acceleration.head and acceleration.head.last
    acceleration.undo()
    error = max(error, *map(difference, ours, plain))
    found = [(identities.of_forward(type(model)), named(type(model)), MODEL)]
    found += [] if loss is None else [(identities.of_function(loss.found), named(loss.found), LOSS)]
    above = () if last is None else models_above(last)
    found += [(identities.of_forward(type(one)), named(type(one)), MODEL) for one in above]
    return error, found


def named(value: Any) -> str:
    """Return the name of a class or function with its Python module, relative to transformers.models if possible."""
    return f"{value.__module__.removeprefix('transformers.models.')}.{value.__qualname__}"


def losses(model: Any) -> list[Any]:
    """Return the loss of a step in training mode, and the gradient of the input embeddings."""
    from tests.speed.architectures import inputs

    given = inputs(model, 24)
    labels = given["input_ids"].clone()
    labels[:, :9] = -100
    weight = model.train().get_input_embeddings().weight.requires_grad_(True)
    weight.grad = None
    try:
        output = model(**given, labels=labels)
        output.loss.backward()
    finally:
        weight.requires_grad_(False)
        model.eval()
    return [output.loss.detach(), weight.grad]


def answers(model: Any) -> list[Any]:
    """Return logits, or another first output, and the gradient of the input embeddings, at several lengths."""
    import torch
    from tests.speed.architectures import inputs

    made = []
    for tokens in (1, 24):
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        weight.grad = None
        try:
            output = model(**inputs(model, tokens))
        except (RuntimeError, ValueError, IndexError):  # the model may not support this length
            continue
        first = next(v for v in (output.get("logits"), *output.values()) if isinstance(v, torch.Tensor))
        (first * torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view(first.shape)).sum().backward()
        weight.requires_grad_(False)
        made += [first.detach(), weight.grad]
    return made


def difference(ours: Any, theirs: Any) -> float:
    """Return the relative difference of two tensors (…)."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return float(ours is not theirs)
    return float((ours - theirs).norm()) / max(float(theirs.norm()), 1e-30)


if __name__ == "__main__":
    main()
