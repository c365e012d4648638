"""A checkpoint is complete or absent, and every kind of damage to any of its files is detected."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit import durable
from lorakit.errors import DiskError, RunError
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.files.checkpoint import random_state
from lorakit.train.files.train_state import TrainState

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json")


def _write_adapter(folder: Path) -> None:
    durable.write_bytes(folder / "adapter_model.safetensors", os.urandom(512))


def _save(folder: Path, step: int, **state: int) -> Path:
    random = [random_state()]
    snapshot = checkpoint.Snapshot(
        state=TrainState(step=step, data={"epoch": 0, "batch": step}, **state),
        optimizer={"exp_avg/w": torch.randn(4, 8), "step/w": torch.tensor(float(step))},
        random=random,
        environment={"threads": 1},
        schedule={"kind": "cosine"},
    )
    return checkpoint.save(folder, snapshot, _write_adapter)


def test_a_loss_is_known_at_the_best_and_the_latest_evaluation() -> None:
    state = TrainState()
    for step, loss in ((0, 2.0), (2, 1.5), (3, 1.6), (4, 1.7)):
        state.step = step
        state.note_evaluation(loss)
    state.step = 5
    assert [state.loss_at(step) for step in range(6)] == [None, None, 1.5, None, 1.7, None]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    path = _save(tmp_path, 3, best_step=2)
    snapshot = checkpoint.load(path)
    assert path.name == "checkpoint-3"
    assert (snapshot.state.step, snapshot.state.best_step, snapshot.state.data) == (3, 2, {"epoch": 0, "batch": 3})
    assert snapshot.optimizer["exp_avg/w"].shape == (4, 8)
    assert float(snapshot.optimizer["step/w"]) == 3.0
    assert torch.equal(snapshot.random[0][0]["torch"], before)
    assert snapshot.environment == {"threads": 1}
    assert {p.name for p in path.iterdir()} == set(FILES)
    assert not list(tmp_path.glob(f"{durable.TEMPORARY}*"))


def _missing(path: Path, older: Path) -> None:
    path.unlink()


def _empty(path: Path, older: Path) -> None:
    path.write_bytes(b"")


def _half(path: Path, older: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _swapped(path: Path, older: Path) -> None:
    path.write_bytes(older.read_bytes())


def _flip(at: float) -> Callable[[Path, Path], None]:
    def damage(path: Path, older: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1
        path.write_bytes(bytes(data))

    return damage


DAMAGE = {
    "missing": _missing,
    "empty": _empty,
    "half": _half,
    "swapped with the older": _swapped,
    "first bit": _flip(0),
    "bit in the middle": _flip(0.5),
    "last bit": _flip(1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_the_older_checkpoint_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    older, newer = _save(tmp_path, 1), _save(tmp_path, 2)
    DAMAGE[damage](newer / name, older / name)
    with pytest.raises(RunError) as caught:
        checkpoint.load(newer)
    assert str(caught.value).startswith(f"{newer}: ")
    assert name in str(caught.value)
    assert checkpoint.newest_valid(tmp_path) == older
    (path, fault), (valid, none) = checkpoint.verified(tmp_path)
    assert (path, valid, none) == (newer, older, None)
    assert name in str(fault)


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = _save(tmp_path, 1) / checkpoint.MANIFEST
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ (1 << position % 8)]) + good[position + 1 :])
        with pytest.raises(RunError, match=r"manifest\.json is missing, damaged or from another checkpoint"):
            checkpoint.verify(path.parent)
    path.write_bytes(good)
    checkpoint.verify(path.parent)


def test_a_folder_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 1).rename(tmp_path / "checkpoint-9")
    with pytest.raises(RunError, match="from another checkpoint"):
        checkpoint.verify(tmp_path / "checkpoint-9")


def test_a_newer_empty_folder_is_passed_over(tmp_path: Path) -> None:
    good = _save(tmp_path, 1)
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-8").write_text("no folder", encoding="utf-8")
    assert checkpoint.newest_valid(tmp_path) == good
    assert [(path.name, fault is None) for path, fault in checkpoint.verified(tmp_path)] == [
        ("checkpoint-7", False),
        ("checkpoint-1", True),
    ]
    assert checkpoint.newest_valid(tmp_path / "nowhere") is None


def test_files_that_people_add_do_no_harm(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "notes.txt").write_text("mine", encoding="utf-8")
    checkpoint.verify(path)


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"fields of the checkpoint's state do not match this version of lorakit \(step\)"
    ):
        TrainState.from_dict({key: value for key, value in dataclasses.asdict(TrainState()).items() if key != "step"})


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(2, None, [4, 5]), (1, None, [5]), (2, 1, [1, 5]), (1, 1, [1, 5]), (3, 1, [1, 4, 5]), (9, None, [1, 2, 3, 4, 5]), (1, 5, [5])],
)  # fmt: skip
def test_the_best_and_the_newest_are_spared(tmp_path: Path, limit: int, best: int | None, left: list[int]) -> None:
    for step in range(1, 6):
        _save(tmp_path, step)
    checkpoint.prune(tmp_path, limit, best)
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 1, best_step=1)
    assert checkpoint.load(tmp_path / "checkpoint-1").state.best_step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_damaged_one_set_aside_is_no_checkpoint_any_more(tmp_path: Path) -> None:
    for step in (1, 1):
        moved = checkpoint.set_aside(_save(tmp_path, step))
        assert moved.name.startswith("damaged-checkpoint-1")
    assert run_folder.checkpoints(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = _save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError) as caught:
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert str(caught.value) == (f"{tmp_path / 'checkpoint-2'}: cannot be written (No space left on device).")
    assert list(checkpoint.verified(tmp_path)) == [(older, None)]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


CRASH = """
import builtins, io, json, os, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lorakit import durable, durable_folders
from lorakit.train.files import checkpoint
from lorakit.train.files.checkpoint import random_state
from lorakit.train.files.train_state import TrainState

root, again = Path(sys.argv[1]), sys.argv[2] == "again"
AUDITED = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
left = None

def count(what):
    global left
    if left is not None:
        left -= 1
        if left == 0:
            os._exit(77)

def audit(event, arguments):
    if event in AUDITED:
        count(event)

class Torn:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, data):
        self.file.write(bytes(data)[: len(data) // 2])
        self.file.flush()
        count("write")
        return self.file.write(bytes(data)[len(data) // 2 :])

real_open, real_fsync, real_os_open, real_write = io.open, os.fsync, os.open, os.write
def watched_open(path, mode="r", *rest, **named):
    writing = set(mode) & set("wax+")
    if writing:
        count("open")
    file = real_open(path, mode, *rest, **named)
    return Torn(file) if writing and "b" in mode else file
def watched_os_open(path, flags, *rest, **named):
    if flags & os.O_CREAT:
        count("open")
    return real_os_open(path, flags, *rest, **named)
def torn_write(descriptor, data):
    half = len(data) // 2
    real_write(descriptor, bytes(data)[:half])
    count("write")
    return half + real_write(descriptor, bytes(data)[half:])
def watched_fsync(descriptor):
    count("fsync")
    real_fsync(descriptor)

def save(folder, step, seed):
    generator = torch.Generator().manual_seed(seed)
    snapshot = checkpoint.Snapshot(
        TrainState(step=step, data={}), {"exp_avg/w": torch.randn(4, 4, generator=generator)}, [random_state()], {}, {}
    )
    def adapter(where):
        durable.write_bytes(where / "adapter_model.safetensors", bytes(64))
        durable.write_json(where / "adapter_config.json", {"r": 8})
    checkpoint.save(folder, snapshot, adapter)
    checkpoint.prune(folder, 1 if not again else 2, None)

sys.addaudithook(audit)
operation, outcomes = 0, []
while True:
    operation += 1
    folder = root / f"{operation}"
    folder.mkdir()
    save(folder, 1, 1)
    if again:
        save(folder, 2, 2)
    child = os.fork()
    if child == 0:
        io.open = builtins.open = watched_open
        os.fsync, os.open, os.write = watched_fsync, watched_os_open, torn_write
        left = operation
        save(folder, 2, 3)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    newest, *_ = checkpoint.verified(folder)
    found = checkpoint.newest_valid(folder)
    loaded = checkpoint.load(found)
    durable_folders.sweep(folder)
    save(folder, 3, 4)
    outcomes.append({
        "code": code,
        "found": found.name,
        "skipped": int(newest[1] is not None),
        "value": float(loaded.optimizer["exp_avg/w"][0, 0]),
        "then": checkpoint.newest_valid(folder).name,
        "left": sorted(p.name for p in folder.iterdir() if not p.name.startswith("checkpoint-")),
    })
    shutil.rmtree(folder)
    if code == 0:
        break
print(json.dumps(outcomes))
"""


@pytest.mark.costly
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["new", "again"])
def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path), kind], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 30
    assert {o["code"] for o in outcomes[:-1]} == {77}
    assert outcomes[-1] == {**outcomes[-1], "code": 0, "found": "checkpoint-2"}
    for outcome in outcomes:
        assert outcome["found"] in ("checkpoint-1", "checkpoint-2")
        assert (outcome["skipped"], outcome["then"], outcome["left"]) == (0, "checkpoint-3", [])
    # every value is that of one complete save, never a mixture: three saves, three values
    assert len({o["value"] for o in outcomes}) <= 3
