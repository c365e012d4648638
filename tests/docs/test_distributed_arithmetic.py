"""docs/distributed-arithmetic.md has the output of `lorakit plan` and tables of the same numbers.

`python -m tests.docs.test_distributed_arithmetic` writes them again.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorakit.cli import main
from lorakit.config import LoraConfig
from lorakit.plan import Cluster, Job, Plan, catalogue, estimate
from lorakit.plan.parallel import LINKS, WAYS, rank_plan
from lorakit.tables import format_bytes, format_percent, format_quantity

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed-arithmetic.md"
COMMAND = re.compile(r"(```sh\nlorakit (plan [^\n]*)\n```\n\n```text\n)(.*?)(```\n)", re.DOTALL)
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(\n(?:\|.*\n)*)")


def planned() -> Plan:
    shape = catalogue.published("Llama-3.1-8B")
    assert shape is not None
    return estimate(shape, LoraConfig(r=16, target_modules="all-linear"), Job(4, 512, accelerated=True))


def sent() -> Iterator[list[str]]:
    """Yield what each process sends in a step of one batch, in each way."""
    plan = planned()
    gradients = plan.lora.memory.bytes_of("gradients")
    yield ["N", "gradients", "sum of gradients", *(f"all-gathers, `{way}`" for way in WAYS[:0:-1])]
    for count in (2, 8, 64):
        traffic = {way: rank_plan(plan, Cluster(count), way).traffic for way in WAYS}
        sizes = {way: format_bytes(each.gathered_bytes) for way, each in traffic.items()}
        sizes |= {"hsdp": "one node"} if Cluster(count).nodes == 1 else {}
        gathered = [sizes[way] for way in WAYS[:0:-1]]
        yield [f"{count}", format_bytes(gradients), format_bytes(traffic["ddp"].reduced_bytes), *gathered]


def links() -> Iterator[list[str]]:
    yield ["name", "rate in one direction", "source"]
    for link in LINKS.values():
        yield [f"`{link.name}`", format_quantity(link.bytes_per_second, "B/s"), link.source]


def hiding() -> Iterator[list[str]]:
    """Yield the tokens per batch that hide all-gathers of a base in bfloat16: e · F / (2 · B), with e = 2."""
    names = ("pcie4", "nvlink4", "100gbe", "400gbe")
    yield ["bfloat16, matmuls of", *(f"`{name}`" for name in names)]
    for rate in (50e12, 100e12, 400e12):
        tokens = (2 * rate / (2 * LINKS[name].bytes_per_second) for name in names)
        yield [format_quantity(rate, "FLOP/s"), *(f"{round(each):,}" for each in tokens)]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {"sent": sent, "links": links, "hiding": hiding}


def output(command: str) -> str:
    """Return the part of a command's output that is about several processes."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        assert main(shlex.split(command)) == 0
    text = stream.getvalue()
    return text[text.index("processes ") :]


def table(name: str) -> str:
    head, *body = TABLES[name]()
    return "\n" + "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *body))


def updated(page: str) -> str:
    page = COMMAND.sub(lambda match: match[1] + output(match[2]) + match[4], page)
    return TABLE.sub(lambda match: match[1] + table(match[2]), page)


def test_the_page_has_what_the_plan_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(COMMAND.findall(page)) == 3 and {name for _, name, _ in TABLE.findall(page)} == set(TABLES)
    assert updated(page) == page


def test_figures_in_the_text() -> None:
    page, shape = PAGE.read_text(encoding="utf-8"), catalogue.published("Llama-3.1-70B")
    assert shape is not None
    config = LoraConfig(r=16, target_modules="all-linear")
    packed = estimate(shape, config, Job(quantization="nf4")).lora.memory.bytes_of("weights")
    assert f"has {packed / 1e9:.0f} GB" in page
    assert format_percent(0.15, 0) in page
    flops = planned().lora.flops.total
    assert 1500 * flops == pytest.approx(50e12, rel=0.1)
    assert 1400 * estimate(shape, config, Job(4, 512)).lora.flops.total == pytest.approx(400e12, rel=0.1)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
