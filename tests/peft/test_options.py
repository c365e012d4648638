"""Options that are not built, have no effect, or are unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import NotYetSupported
from lorakit.peft import LoraConfig, PeftModel, get_peft_model
from lorakit.peft.options import NEUTRAL, WITHOUT_EFFECT

CONFIG = LoraConfig(target_modules=["q_proj"])


def test_what_has_no_effect_is_accepted_everywhere(tiny_llama: Any, tmp_path: Path) -> None:
    options = dict.fromkeys(WITHOUT_EFFECT, True)
    model = get_peft_model(tiny_llama, CONFIG, **options)
    model.add_adapter("b", CONFIG, **options)
    model.save_pretrained(tmp_path, **options)
    model.load_adapter(tmp_path, "c", **options)
    assert PeftModel.from_pretrained(model.unload(), tmp_path, **options).active_adapter == "default"


def test_defaults_of_what_is_not_built_are_accepted(tiny_llama: Any) -> None:
    get_peft_model(tiny_llama, CONFIG, **{name: values[0] for name, values in NEUTRAL.items()})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mixed": True}, "PeftModel: mixed=True is not built yet. Leave it at False, its default."),
        ({"autocast_adapter_dtype": False}, "PeftModel: autocast_adapter_dtype=False is not built yet"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tiny_llama: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(NotYetSupported) as refused:
        get_peft_model(tiny_llama, CONFIG, **options)
    assert text in str(refused.value)
    assert not any("lora" in name for name, _ in tiny_llama.named_modules())


def test_saving_the_bases_own_matrices_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, CONFIG)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    with pytest.raises(NotYetSupported, match="save_pretrained: save_embedding_layers=True is not built yet"):
        model.save_pretrained(tmp_path / "b", save_embedding_layers=True)
    assert not (tmp_path / "b").exists()


def test_what_nobody_knows_is_warned_about(tiny_llama: Any) -> None:
    with pytest.warns(
        UserWarning, match="low_cpu_memusage is not known here and has no effect. Did you mean low_cpu_mem_"
    ):
        get_peft_model(tiny_llama, CONFIG, low_cpu_memusage=True)
