"""Continue a run after a launcher has started its processes again, because one of them had ended.

The run's record says which job of a launcher has started it. Only a run of the same job is continued: another run in
the same directory is what the settings say about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.tables import format_count
from lorakit.train.files import run_folder
from lorakit.train.loop.progress import Progress
from lorakit.train.processes.processes import Processes
from lorakit.train.settings.settings import TrainSettings

LAUNCH = "launch"
"""Key of `run.json` for the launcher's job and the number of restarts."""


def launch_record(processes: Processes) -> dict[str, Any] | None:
    """Return what `run.json` says about the launcher, or None if the launcher does not restart processes."""
    return {"job": processes.job, "restarts": processes.restarts} if processes.job else None


def continued(settings: TrainSettings, processes: Processes, progress: Progress) -> TrainSettings:
    """Return the settings with which the processes go on; all processes must call this.

    Args:
        settings: The settings of the job.
        processes: The processes of the run.
        progress: Receives a message about the restart.

    Returns:
        The given settings or, if these processes were started again and the job has begun its run, the same with
        `resume`.

    Raises:
        RunError: The record of the run cannot be read.
    """
    if not processes.restarts:
        return settings
    has_begun = processes.from_first(lambda: _is_of_job(Path(settings.output_dir), processes.job))
    times = format_count(processes.restarts, "time")
    how = "the run goes on from its newest checkpoint" if has_begun else "the run starts at its first step"
    progress.say(f"The processes were started again ({times} so far), because one of them ended; {how}.")
    if not has_begun or settings.resume:
        return settings
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return TrainSettings(**{**given, "resume": True, "overwrite": False})


def _is_of_job(folder: Path, job: str) -> bool:
    """Return whether a directory contains a run that a job of a launcher has begun."""
    record: Mapping[str, Any] = run_folder.read_record(folder) or {}
    return bool(job) and (record.get(LAUNCH) or {}).get("job") == job
