"""Values that processes compare before they load weights, with the order of labels and the columns that are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import UsageError
from lorakit.tasks import Target
from lorakit.train.files.run_folder import unlock
from lorakit.train.processes.processes import Processes
from lorakit.train.progress import Progress
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.agreement import check_alike
from lorakit.train.setup.run_spec import build_spec
from lorakit.train.spec import RunSpec


class Pair(Processes):
    """Two processes; the other one has given values."""

    def __init__(self, other: dict[str, str] | None = None) -> None:
        super().__init__(0, 2)
        self.other, self.mine = other, dict[str, str]()

    def exchange(self, value: Any) -> list[Any]:
        self.mine = value or self.mine
        return [value, self.other or value]

    def from_first(self, make: Any) -> Any:
        return make()


@pytest.fixture
def spec(short_run: dict[str, Any], tmp_path: Path) -> Any:
    rows = [{"text": f"a fox {at}", "label": ["1", "01"][at % 2]} for at in range(6)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build_spec(TrainSettings(**{**short_run, "data": path, "task": "classification"}), Progress())
    yield found
    unlock(found.lock)


def test_labels_and_columns_are_compared(spec: RunSpec) -> None:
    pair = Pair()
    check_alike(dataclasses.replace(spec, processes=pair))
    assert "['01', '1']" in pair.mine["labels"] and "label" in pair.mine["columns of the data"]
    swapped = dataclasses.replace(spec.task, target=Target("class", spec.task.target.names[::-1]))
    with pytest.raises(UsageError) as caught:
        check_alike(dataclasses.replace(spec, task=swapped, processes=Pair(pair.mine)))
    assert caught.value.field == "labels"
    with pytest.raises(UsageError) as caught:
        check_alike(dataclasses.replace(spec, processes=Pair({**pair.mine, "columns of the data": "{}"})))
    assert caught.value.field == "columns of the data"
