"""`build_spec`: its content, and that it locks the run directory only after every check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit import hub
from lorakit.errors import RunError, TargetError, UsageError
from lorakit.train.files import run_folder
from lorakit.train.progress import Progress
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.run_spec import build_spec
from lorakit.train.trainer import run


def test_everything_before_the_weights_is_known(short_run: dict[str, Any], tmp_path: Path) -> None:
    spec = build_spec(TrainSettings(**short_run), Progress())
    try:
        assert spec.folder == tmp_path / "run" and list(spec.folder.iterdir()) == []
        assert (spec.forecast.config.r, spec.forecast.max_length, spec.device.type) == (2, 24, "cpu")
        assert sorted(spec.hashes) == [str(path) for path in short_run["data"]]
        assert spec.record is None and spec.quantization is None and spec.quantization_values is None
        with pytest.raises(RunError, match="a run is active"):
            run_folder.lock(spec.folder)
    finally:
        run_folder.unlock(spec.lock)


@pytest.mark.parametrize(
    ("more", "error"),
    [({"target_modules": ["q_prok"]}, TargetError), ({"max_length": 4096}, UsageError)],
)
def test_a_rejected_run_makes_no_directory(
    short_run: dict[str, Any], tmp_path: Path, more: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        build_spec(TrainSettings(**{**short_run, **more}), Progress())
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_is_hashed_once_in_a_run(short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, tokenizer_hash = list[str](), hub.tokenizer_hash

    def counted(tokenizer: Any) -> str:
        hashed.append(tokenizer_hash(tokenizer))
        return hashed[-1]

    monkeypatch.setattr(hub, "tokenizer_hash", counted)
    result = run(TrainSettings(**short_run, max_steps=2, save_steps=1, tuning=False))
    assert len(hashed) == 1
    assert result.adapter is not None
    metadata = json.loads((result.adapter / "lorakit.json").read_text())
    assert hashed[0] in json.dumps(metadata)
