"""lorakit.hub.models: saving gives a plain directory, or an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import DiskError, ModelError
from lorakit.hub import load_model, load_tokenizer, save_model


def test_what_is_written_loads_bit_for_bit(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_model(tiny_llama, tmp_path, tiny_tokenizer)
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tiny_llama.state_dict().items())
    assert load_tokenizer(tmp_path).get_vocab() == tiny_tokenizer.get_vocab()


def test_others_may_read_the_weights_where_the_umask_lets_them(tiny_llama: Any, tmp_path: Path) -> None:
    save_model(tiny_llama, tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_disk_without_room(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(DiskError, match="140 kB needed, 0 B free"):
        save_model(tiny_llama, tmp_path)


@pytest.mark.parametrize(
    ("raised", "error", "said"),
    [
        (OSError(28, "No space left on device"), DiskError, "the model cannot be written"),
        (
            ValueError("odd  settings"),
            ModelError,
            r"transformers cannot save this LlamaForCausalLM \(odd settings\)",
        ),
    ],
)
def test_what_transformers_raises_becomes_a_sentence(
    tiny_llama: Any, tmp_path: Path, raised: Exception, error: type[Exception], said: str
) -> None:
    def refuse(folder: str, **_: object) -> None:
        raise raised

    tiny_llama.save_pretrained = refuse
    with pytest.raises(error, match=said):
        save_model(tiny_llama, tmp_path)
