"""Two processes that gather tensors together, and the second one fails; started by the tests.

python process_lockstep.py FOLDER_FOR_OUTCOMES HOW

The second process raises an error ("raises") or ends at once ("ends"). The error of the first one is written to `0.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from lorakit.errors import DataError, LorakitError
from lorakit.train.processes.processes import joined

with joined() as processes:
    processes.in_lockstep = True
    try:
        with processes.together():
            processes.start_sum(torch.ones(3))()
            if processes.is_first:
                torch.distributed.all_reduce(torch.ones(1000))
            elif sys.argv[2] == "ends":
                os._exit(9)
            raise DataError("this row is missing", field="data")
    except LorakitError as cause:
        found = {"kind": type(cause).__name__, "message": str(cause), "field": cause.field}
        Path(sys.argv[1], f"{processes.rank}.json").write_text(json.dumps(found))
