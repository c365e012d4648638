"""Claim: embeddings and head could be stored in int8 only with several scales per row.

    python benchmarks/bench_int8_embeddings.py [--tasks text instructions] [--evaluated 105]

SmolLM2-135M-Instruct in bf16, whose head is the embedding matrix, on the evaluation rows of bench_int8_parity.py.
The matrix is rounded to int8 with one scale per row, or with one per 64 values, and used in bf16, in the embedding and
in the head: nothing is multiplied in int8. A row has the difference of the loss per token to the unrounded matrix,
paired by row, with its standard error, and the bytes of the matrix. It is appended to results/int8_embeddings.jsonl.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bench_int8_parity import HELD_OUT, difference, evaluate, per_token, rows_of
from runner import append_row
from torch import Tensor, nn

from lorakit import hub
from lorakit.ops.int8_weight import quantize_rows

GROUPS = {"one scale per row": 576, "one scale per 64 values": 64}
"""Values that share a scale."""


def main() -> None:
    """Measure each rounding on each task, and append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(HELD_OUT), default=list(HELD_OUT))
    parser.add_argument("--evaluated", type=int, default=max(HELD_OUT.values()), help="evaluation rows at most")
    options = parser.parse_args()
    model = hub.load_model("smollm2", dtype="bfloat16").requires_grad_(False)
    whole = model.get_output_embeddings().weight.detach()
    for name in options.tasks:
        task = rows_of(name, options.evaluated)
        use(model, whole)
        base = evaluate(model, task)
        for kind, values in GROUPS.items():
            use(model, rounded(whole, values))
            found = evaluate(model, task)
            facts = {"what": kind, "task": name, "tokens": sum(base["counts"]), "bytes_before": 2 * whole.numel()}
            facts |= {"bytes_after": whole.numel() + 4 * whole.numel() // values}
            append_row("int8_embeddings", {**facts, "loss": per_token(found), **difference(found, base)}, {})


def use(model: Any, weight: Tensor) -> None:
    """Set the matrix of the embedding and of the head, which share it."""
    shared = nn.Parameter(weight, requires_grad=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight = shared


def rounded(weight: Tensor, values: int) -> Tensor:
    """Return a matrix rounded to int8, with a scale per `values` values of a row, in its dtype."""
    q, scale = quantize_rows(weight.float().view(-1, values))
    return (q.float() * scale[:, None]).view(weight.shape).to(weight.dtype)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
