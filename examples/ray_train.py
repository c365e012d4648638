"""Train one adapter in two workers of Ray Train, on this machine: `pip install 'lorakit[ray]'`.

Ray starts the workers and their process group, which lorakit uses: the workers share the rows of every step, and the
first one writes the run directory. Data and output must be on a disk that all workers can reach, with absolute paths.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

DATA = Path(__file__).resolve().parent / "data" / "pairs.jsonl"


def train_in_worker(settings: dict[str, Any]) -> None:
    from lorakit.train import TrainSettings, run  # imported in the worker

    result = run(TrainSettings(**settings))
    print(f"worker {ray.train.get_context().get_world_rank()}: {result.ending} after {result.steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ray"))
    parser.add_argument("--max-steps", type=int, default=10)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    settings = {
        "model": given.model,
        "data": [str(given.data.resolve())],
        "output_dir": str(given.output_dir.resolve()),
        "max_steps": given.max_steps,
        "dtype": given.dtype,
        "max_length": 64,
        "eval_fraction": 0,
    }
    ray.init(num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as storage:  # Ray's own results; lorakit writes to output_dir
        workers = TorchTrainer(
            train_in_worker,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=storage),
        )
        workers.fit()
    ray.shutdown()
    print(f"adapter: {given.output_dir / 'adapter'}")


if __name__ == "__main__":
    main()
