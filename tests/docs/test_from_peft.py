"""docs/from-peft.md: every test it names exists, every fault and complaint has a line, every field of the config a place."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.config import LoraConfig
from lorakit.config.checks import NOT_BUILT

from ..peft.running import run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from-peft.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:\w+/)?\w+\.py)((?:::\w+)+)`", PAGE)))


def section(title: str) -> str:
    """The text under a heading, up to the next of any depth."""
    return re.split(r"^#+ ", PAGE.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the rows below a heading that have a first cell."""
    lines = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if cells[0].strip()}


@pytest.mark.parametrize(("file", "path"), NAMED, ids=["".join(pair) for pair in NAMED])
def test_a_named_test_exists(file: str, path: str) -> None:
    node: ast.AST = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    for name in path.removeprefix("::").split("::"):
        inner = [child for child in getattr(node, "body", []) if getattr(child, "name", None) == name]
        assert inner, f"{file} has no {name}"
        node = inner[0]


def test_every_fault_and_complaint_has_a_line_with_a_test() -> None:
    faults = rows("Wrong results and silent failures")
    assert list(faults) == [str(number) for number in range(1, 17)]
    complaints = rows("Common complaints of users")
    assert list(map(int, complaints)) == [1, 2, 4, 5, 6, 8, 12, 13, 14, 15, 17, 18, 19, 22, 23, 24]
    for cells in (*faults.values(), *complaints.values(), rows("Merge precision")["4.2"]):
        assert len(cells) == 3
        assert all(cells)
        assert re.fullmatch(r"(`[\w/]+\.py(::\w+)+` ?)+", cells[2]), cells[2]


def test_every_field_of_the_config_has_its_place() -> None:
    """A field that was built moves from the second row to the first."""
    table = rows("Supported features")
    known = {field.name for field in dataclasses.fields(LoraConfig)} - {"unknown"}
    named = {name.partition(" ")[0]: set(re.findall(r"`(\w+)`", cells[0])) for name, cells in table.items()}
    assert named["raises"] == set(NOT_BUILT)
    assert named["supported"] | named["accepted"] == known - set(NOT_BUILT)


BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_mixin_as_the_page_shows_it(tiny_llama: Any, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    ids = torch.randint(0, 60, (8, 6), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    space = {"model": tiny_llama, "args": args, "rows": [{"input_ids": row, "labels": row} for row in ids]}
    exec(BLOCKS[0], space)
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_stand_in_as_the_page_shows_it(tiny_model_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    runs, program = tmp_path / "runs", tmp_path / "program.py"
    text = BLOCKS[1].replace("HuggingFaceTB/SmolLM2-135M", str(tiny_model_directory)).replace('"runs/', f'"{runs}/')
    on_cpu = "max_steps=2, max_length=16, report_to=[], use_cpu=True, bf16=False"
    program.write_text(text.replace("max_steps=2", on_cpu), encoding="utf-8")
    run(program, peft=False, links=tmp_path / "links")
    for kind in ("sft", "dpo"):
        assert (runs / kind / "checkpoint-2" / "adapter_model.safetensors").exists()
        assert not (runs / kind / "checkpoint-2" / "model.safetensors").exists()
