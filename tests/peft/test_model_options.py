"""Options that are not supported, have no effect, or are unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import NotYetSupported
from lorakit.peft import LoraConfig, PeftModel, get_peft_model
from lorakit.peft.loaded import NOT_BUILT, WITHOUT_EFFECT

CONFIG = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)


def test_what_has_no_effect_is_accepted_where_files_are_read_and_written(tiny_llama: Any, tmp_path: Path) -> None:
    options = dict.fromkeys(WITHOUT_EFFECT, True)
    model = get_peft_model(tiny_llama, CONFIG, low_cpu_mem_usage=True)
    model.save_pretrained(tmp_path, **options, **{NOT_BUILT: False})
    model.load_adapter(tmp_path, "c", **options)
    assert PeftModel.from_pretrained(model.unload(), tmp_path, **options).active_adapter == "default"


@pytest.mark.parametrize("name", [NOT_BUILT])
def test_what_is_not_built_is_refused_by_name(tiny_llama: Any, name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, CONFIG)
    with pytest.raises(NotYetSupported, match=f"save_pretrained: {name}='x' is not supported yet. Leave it at"):
        model.save_pretrained(tmp_path / "a", **{name: "x"})
    assert not (tmp_path / "a").exists()


def test_what_nobody_knows_is_warned_about(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, CONFIG)
    with pytest.warns(UserWarning, match="unknown option torch_dtyp has no effect. Did you mean torch_dtype"):
        model.save_pretrained(tmp_path, torch_dtyp=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'low_cpu_memusage'"):
        get_peft_model(tiny_llama, CONFIG, low_cpu_memusage=True)
