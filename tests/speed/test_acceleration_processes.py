"""DDP and FSDP2 over gloo in two processes: three steps of the accelerated model equal those of the plain one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("sharded_steps.py")

pytestmark = pytest.mark.slow


def steps(folder: Path, way: str, fast: bool) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Return losses and gradients of both processes."""
    folder.mkdir()
    common = [str(folder / "meeting"), way, str(int(fast)), str(folder / "made")]
    running = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), *common], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return [torch.load(folder / f"made.{rank}") for rank in range(2)]


@pytest.mark.parametrize("way", ["ddp", "fsdp by layer", "fsdp whole", "fsdp head"])
def test_three_steps_are_those_of_the_plain_model(way: str, tmp_path: Path) -> None:
    theirs, ours = steps(tmp_path / "plain", way, False), steps(tmp_path / "fast", way, True)
    for (losses, gradients), (wanted, expected) in zip(ours, theirs, strict=True):
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=2e-4, atol=1e-6)
    assert theirs[0][0][0] != theirs[0][0][2]
