"""One of several processes that train together; started by `processes.start`.

python process_runs.py FILE_OF_RUNS FOLDER_FOR_OUTCOMES

The file has a JSON list of runs: the settings of each, with a key `by_rank` for settings that differ between processes.
The outcome of each run is written to `<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import LorakitError
from lorakit.train.processes import joined
from lorakit.train.settings import TrainSettings
from lorakit.train.trainer import run


def outcome(settings: dict[str, Any], rank: int) -> dict[str, Any]:
    own = settings.pop("by_rank", {}).get(str(rank), {})
    os.chdir(own.pop("cwd", Path.cwd()))
    try:
        result = run(TrainSettings(**{**settings, **own}))
    except LorakitError as cause:
        return {"kind": type(cause).__name__, "message": str(cause), "field": cause.field}
    return {"ending": result.ending, "steps": result.steps}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, outcomes = int(os.environ.get("RANK", "0")), []
    with joined():
        for settings in json.loads(Path(sys.argv[1]).read_text()):
            outcomes.append(outcome(settings, rank))
    Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(outcomes))
