"""Write the table of models with experts in docs/from-peft.md: how lorakit compares with the installed peft in each.

    python scripts/experts_table.py [--check]

The rows come from the small models of tests/peft/experts.py, with the installed releases of transformers and peft.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import generated_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "from-peft.md"
BEGIN = generated_table.begin(__file__)
BOUND = 1e-5
"""Largest difference, absolute plus relative, of values that the table calls equal; the models compute in fp32."""

WAYS: Mapping[str, str] = {"all-linear": "`all-linear`", "old names": "old names", "parameters": "parameters"}
"""Kind of targets -> its name in the table."""

HEAD = (
    "| model | targets | adapted weights | tensors | names, shapes | outputs | gradients | from peft | to peft |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


class Row(NamedTuple):
    """One row of the table, without the name of the model.

    Attributes:
        targets: How the config names the weights.
        weights: Names of the adapted weights, without layers.
        tensors: Number of trained tensors.
        names: Whether the names and shapes of the trained tensors are those of peft.
        outputs: Whether losses and logits are, in training and evaluation.
        gradients: Whether the gradients of all trained tensors are.
        read: Whether peft's files give peft's outputs in lorakit, in the core and through `lorakit.peft`.
        written: Whether lorakit's files give the same outputs in peft.
    """

    targets: str
    weights: str
    tensors: str
    names: str
    outputs: str
    gradients: str
    read: str
    written: str


def main() -> int:
    """Write the table, or compare it with the page; return the exit status."""
    return generated_table.write(PAGE, BEGIN, table)


def table() -> str:
    """Return the table, with the versions that it is for."""
    sys.path.insert(0, str(ROOT))
    import peft
    import transformers
    from tests.peft.experts import FAMILIES

    lines = [f"| {family.name} | {' | '.join(row)} |\n" for family in FAMILIES for row in rows_of(family)]
    return f"transformers {transformers.__version__}, peft {peft.__version__}.\n\n{HEAD}{''.join(lines)}"


def rows_of(family: Any) -> Iterator[Row]:
    """Yield the rows of a family: one for each way to name its weights."""
    from tests.peft.test_model_experts import targets_of

    for way, name in WAYS.items():
        if family.old or way != "old names":
            yield row_of(family, name, targets_of(family, way))


def row_of(family: Any, name: str, targets: Mapping[str, Any]) -> Row:
    """Return the row of a family with these targets.

    Args:
        family: One of `FAMILIES` in tests/peft/experts.py.
        name: How the table names the targets.
        targets: Fields of the config.
    """
    from tests.peft.experts import gradients, loss_and_logits, pair, trained

    theirs, ours = pair(family, **targets)
    found, expected = trained(ours), trained(theirs)
    values = [[loss_and_logits(model.train(mode)) for mode in (True, False)] for model in (ours, theirs)]
    ways = [dict(enumerate([value for both in one for value in both])) for one in values]
    return Row(
        name,
        ", ".join(dict.fromkeys(weights_of(ours))),
        str(len(found)),
        "equal" if found == expected else f"{len(found.items() ^ expected.items())} differ",
        compared(*ways),
        compared(gradients(ours), gradients(theirs)),
        *files_of(family, ours, theirs),
    )


def weights_of(model: Any) -> Iterator[str]:
    """Yield the name of each adapted weight, without its layer."""
    from lorakit import core

    for site in core.sites(model):
        path = site.path.replace(".base_layer", "").rpartition(".")[2]
        yield f"{path}.{site.layer.spec.parameter}" if site.kind == "Parameter" else path


def files_of(family: Any, ours: Any, theirs: Any) -> tuple[str, str]:
    """Return how outputs compare after loading peft's file with lorakit, and lorakit's file with peft."""
    import peft
    from tests.peft.experts import loss_and_logits, quiet

    import lorakit.peft
    from lorakit import core

    expected = {0: loss_and_logits(theirs.eval())[1]}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/theirs")
        ours.save_pretrained(f"{folder}/ours")
        plain = family.model()
        core.load_adapter(plain, f"{folder}/theirs")
        readers = (plain, lorakit.peft.PeftModel.from_pretrained(family.model(), f"{folder}/theirs"))
        writer = peft.PeftModel.from_pretrained(family.model(), f"{folder}/ours")
    read = {compared({0: loss_and_logits(reader.eval())[1]}, expected) for reader in readers}
    return ", ".join(sorted(read)), compared({0: loss_and_logits(writer.eval())[1]}, expected)


def compared(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> str:
    """Return "equal" if tensors with the same keys are close, and otherwise what differs."""
    import torch

    if found.keys() != expected.keys():
        return "other tensors"
    far = [key for key, value in found.items() if not torch.allclose(value, expected[key], BOUND, BOUND)]
    return f"{len(far)} of {len(found)} differ" if far else "equal"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
