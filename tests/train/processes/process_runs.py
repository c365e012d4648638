"""One of several processes that train together; started by `processes.start`.

python process_runs.py FILE_OF_RUNS FOLDER_FOR_OUTCOMES

The file has a JSON list of runs: the settings of each, with a key `by_rank` for settings that differ between processes
(and `cwd`, or `signal_at`, the step in which the process gets a signal), or a key `saves_only` for a run that is resumed
and saved without a step. The outcome of each run is written to `<rank>.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorakit.data import Batch
from lorakit.errors import LorakitError
from lorakit.train.files.run_folder import unlock
from lorakit.train.loop.loop import save_checkpoint
from lorakit.train.loop.run import RunBatches
from lorakit.train.processes.processes import Processes, joined
from lorakit.train.progress import Progress
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.prepare import prepare
from lorakit.train.setup.run_spec import build_spec
from lorakit.train.trainer import run


class Said(Progress):
    """Progress that keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def say(self, text: str) -> None:
        self.messages.append(text)


@contextmanager
def observed(signal_at: int) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Record the rows of this process in each step, as checksums, and the number of exchanges of values."""
    rows, exchanges = list[list[int]](), [0]
    share, gather = RunBatches.next_share, Processes._gather

    def next_share(self: RunBatches, *arguments: Any) -> list[Batch]:
        batches = share(self, *arguments)
        if len(rows) + 1 == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        masked = [one.input_ids.where(one.attention_mask.bool(), -1) for one in batches]
        rows.append(sorted(zlib.crc32(bytes(str(row[row >= 0].tolist()), "ascii")) for ids in masked for row in ids))
        return batches

    def counted(self: Processes, *arguments: Any) -> Any:
        exchanges[0] += 1
        return gather(self, *arguments)

    RunBatches.next_share, Processes._gather = next_share, counted  # type: ignore[method-assign]
    try:
        yield rows, exchanges
    finally:
        RunBatches.next_share, Processes._gather = share, gather  # type: ignore[method-assign]


def save_again(settings: TrainSettings) -> None:
    """Resume a run, and save its state without a step."""
    with joined() as processes:
        spec = build_spec(settings, Progress(), processes)
        try:
            save_checkpoint(prepare(spec, 0.0))
        finally:
            unlock(spec.lock)


def outcome(settings: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    """Return the ending of a run, the rows of each step, the number of exchanges and the messages; or the error."""
    settings = dict(settings)
    own = settings.pop("by_rank", {}).get(str(rank), {})
    saves_only = settings.pop("saves_only", False)
    os.chdir(own.pop("cwd", Path.cwd()))
    said, signal_at = Said(), own.pop("signal_at", 0)
    try:
        with observed(signal_at) as (rows, exchanges):
            given = TrainSettings(**{**settings, **own})
            if saves_only:
                save_again(given)
                return {}
            result = run(given, said)
    except LorakitError as cause:
        return {"kind": type(cause).__name__, "message": str(cause), "field": cause.field}
    made = {"rows": rows, "exchanges": exchanges[0], "messages": said.messages}
    return {"ending": result.ending, "steps": result.steps, **made}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, outcomes = int(os.environ.get("RANK", "0")), []
    with joined():
        for settings in json.loads(Path(sys.argv[1]).read_text()):
            outcomes.append(outcome(settings, rank))
    Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(outcomes))
