"""Checkpoints at any number of processes: the same files, the same rows after resuming, and the same choices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.report import read_metrics
from lorakit.train.files import checkpoint

from . import process_runs

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

OF_PROCESSES = {"random.safetensors", "state.json", "manifest.json"}
"""Files of a checkpoint that contain the random number generators of each process, or the hash of such a file."""


@pytest.fixture
def settings(steady_run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings of a run of six steps, whose rows per step are those of two processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes, because a checkpoint records it
    yield {**steady_run, "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "eval_steps": 3}
    torch.set_num_threads(threads)


def rows_by_step(outcomes: list[dict[str, Any]]) -> list[list[int]]:
    """Return the rows of all processes together in each step."""
    steps = zip(*(one["rows"] for one in outcomes), strict=True)
    return [sorted(row for share in shares for row in share) for shares in steps]


def losses(folder: str) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(folder)).train]


def check_continued(part: str, whole: str, outcomes: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Check that a run that was resumed at step 3 has the rows and losses of an uninterrupted one."""
    assert [one["ending"] for one in outcomes] == ["finished"] * len(outcomes)
    assert rows_by_step(outcomes) == expected["rows"][3:]
    assert losses(part) == pytest.approx(losses(whole), rel=1e-5)
    [message] = [text for text in outcomes[0]["messages"] if "seeded again" in text]
    assert "rows of each step stay the same" in message
    record = json.loads(Path(part, "run.json").read_text())["processes"]
    seeds = [(3 << 32) + rank for rank in range(len(outcomes))]
    assert record == {"count": len(outcomes), "seeds": seeds, "seeded_at": 3}


def check_same_bytes(first: Path, second: Path, count: int) -> None:
    """Check that a checkpoint of one process equals that of several, except for their random number generators."""
    names = {path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(second).as_posix() for path in second.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "lorakit.json", "optimizer.safetensors"} <= names
    for name in names - OF_PROCESSES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
    generators = [[state.pop("random"), *state.pop("random_of_others", [])] for state in states]
    assert [len(found) for found in generators] == [1, count]
    assert states[0] == states[1]


@pytest.mark.slow
def test_one_and_two_processes_save_the_same_and_continue_each_other(
    settings: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    whole, fewer, more, same = (str(tmp_path / name) for name in ("whole", "fewer", "more", "same"))
    by_one = {**settings, "gradient_accumulation_steps": 2}
    expected = process_runs.outcome({**by_one, "output_dir": whole})
    assert len({row for step in expected["rows"] for row in step}) > 6
    process_runs.outcome({**by_one, "output_dir": more, "max_steps": 3})
    shutil.copytree(more, same)
    runs = [
        {**settings, "output_dir": fewer, "max_steps": 3},
        {**by_one, "output_dir": same, "max_steps": 3, "resume": True, "saves_only": True},
        {**by_one, "output_dir": more, "resume": True},
    ]
    both = outcomes(runs)
    assert rows_by_step([first for first, *_ in both]) == expected["rows"][:3]
    check_same_bytes(Path(more, "checkpoint-3"), Path(same, "checkpoint-3"), 2)
    check_continued(more, whole, [last for *_, last in both], expected)
    last = process_runs.outcome({**settings, "output_dir": fewer, "resume": True})
    check_continued(fewer, whole, [last], expected)


def test_torch_distributed_checkpoint_reads_the_optimizer(settings: dict[str, Any]) -> None:
    from torch.distributed import checkpoint as torch_checkpoint

    if not hasattr(torch_checkpoint, "HuggingFaceStorageReader"):
        pytest.skip("this torch cannot read safetensors in torch.distributed.checkpoint")
    process_runs.outcome({**settings, "max_steps": 1})
    folder = Path(settings["output_dir"], "checkpoint-1")
    saved = checkpoint.load(folder).optimizer
    read = {name: torch.full_like(tensor, -1) for name, tensor in saved.items()}
    with pytest.warns(UserWarning, match="single process"):  # whenever no processes are connected
        torch_checkpoint.load(read, storage_reader=torch_checkpoint.HuggingFaceStorageReader(str(folder)))
    assert saved and all(torch.equal(read[name], tensor) for name, tensor in saved.items())


@pytest.mark.slow
def test_four_processes_save_the_same_as_one_and_continue_two(
    settings: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    whole, one, more, same = (str(tmp_path / name) for name in ("whole", "one", "more", "same"))
    by_one = {**settings, "gradient_accumulation_steps": 2}
    expected = process_runs.outcome({**by_one, "output_dir": whole})
    process_runs.outcome({**by_one, "output_dir": one, "max_steps": 3})
    shutil.copytree(one, same)
    outcomes([{**settings, "output_dir": more, "max_steps": 3}])
    runs = [
        {**by_one, "output_dir": same, "max_steps": 3, "resume": True, "saves_only": True},
        {**settings, "output_dir": more, "resume": True},
    ]
    found = outcomes(runs, count=4)
    check_same_bytes(Path(one, "checkpoint-3"), Path(same, "checkpoint-3"), 4)
    check_continued(more, whole, [last for _, last in found], expected)


@pytest.mark.slow
def test_fit_makes_the_same_choice_in_all_processes(
    settings: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    plain, fit = str(tmp_path / "plain"), str(tmp_path / "fit")
    base = {**settings, "eval_fraction": 0.0, "gradient_accumulation_steps": 2, "save_steps": 100}
    runs = [
        {**base, "output_dir": plain, "max_steps": 3},
        {**base, "output_dir": fit, "max_steps": 3, "fit": "64GB"},
        {**base, "output_dir": fit, "max_steps": 5, "fit": "64GB", "resume": True},
        {**base, "output_dir": str(tmp_path / "longer"), "max_steps": 5},
    ]
    first, second = outcomes(runs)
    assert [one["ending"] for one in (*first, *second)] == ["finished"] * 8
    before, after, again, longer = zip(first, second, strict=True)
    assert rows_by_step(list(before)) == rows_by_step(list(after))
    assert losses(fit) == pytest.approx(losses(str(tmp_path / "longer")), rel=1e-5)
    assert rows_by_step(list(again)) == rows_by_step(list(longer))[3:]
    resolved = json.loads(Path(fit, "run.json").read_text())["resolved"]
    assert resolved["batch_rows"] * resolved["accumulation"] == 8
    assert any(text.startswith("fit ") for text in first[1]["messages"])
    assert first[3]["exchanges"] - first[0]["exchanges"] == 2 * 2  # two per step, also in whole runs
