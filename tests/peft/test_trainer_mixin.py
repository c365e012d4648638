"""`LoraTrainerMixin` over the real Trainer; the long runs, with SFTTrainer and without peft, are separate programs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from lorakit import attach
from lorakit.errors import ConfigError, NotYetSupported, RunError
from lorakit.peft import LoraConfig, LoraTrainerMixin, PeftModel, get_peft_model

from .models import ids, randomise
from .running import run
from .test_installing import FOUR_BITS, TRAINING

CONFIG = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


class LoraTrainer(LoraTrainerMixin, Trainer):
    pass


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    common = {"output_dir": str(folder), "max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True}
    common |= {"disable_tqdm": True, "logging_steps": 1, "dataloader_pin_memory": False, "learning_rate": 0.01}
    return TrainingArguments(**common | more)


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids(8, 6)]


def trainer(model: Any, folder: Path, kind: type = LoraTrainer, **more: Any) -> Any:
    own = {key: more.pop(key) for key in ("peft_config", "model_init", "processing_class") if key in more}
    return kind(model, arguments(folder, **more), train_dataset=rows(), eval_dataset=rows()[:2], **own)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_wrapper_is_trained_and_saved_as_an_adapter(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(**CONFIG))
    lora = trainer(model, tmp_path)
    assert lora.lora_model is model
    assert lora.model is tiny_llama
    lora.train()
    assert names_in(tmp_path / "checkpoint-1") >= {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"}
    assert not list(tmp_path.rglob("model.safetensors"))
    kept = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    own = dict(model.named_parameters())
    assert kept
    assert all(torch.equal(own[key.replace(".weight", ".default.weight")], value) for key, value in kept.items())


def test_an_attached_model_and_a_bare_one_with_a_config(tiny_llama: Any, tmp_path: Path) -> None:
    attach(tiny_llama, LoraConfig(**CONFIG))
    lora = trainer(tiny_llama, tmp_path / "attached")
    assert isinstance(lora.lora_model, PeftModel)
    assert lora.lora_model.get_base_model() is tiny_llama
    lora.train()
    lora.lora_model.unload()
    again = trainer(tiny_llama, tmp_path / "bare", peft_config=LoraConfig(**CONFIG))
    assert list(again.lora_model.peft_config) == ["default"]
    again.save_model()
    assert "adapter_model.safetensors" in names_in(tmp_path / "bare")


def test_a_model_from_model_init_is_adopted(tiny_llama: Any, tmp_path: Path) -> None:
    made = get_peft_model(tiny_llama, LoraConfig(**CONFIG))
    lora = trainer(None, tmp_path, model_init=lambda: made)
    lora.train()
    assert lora.lora_model is made
    assert "adapter_model.safetensors" in names_in(tmp_path / "checkpoint-2")


def test_every_adapter_is_saved_and_read_back(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(**CONFIG))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
    randomise(model)
    lora = trainer(model, tmp_path, max_steps=1)
    lora.train()
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert (tmp_path / "checkpoint-1" / "other" / "adapter_model.safetensors").exists()
    randomise(model)
    lora._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(kept[name], value) for name, value in model.named_parameters())
    assert trained == {name for name, value in model.named_parameters() if value.requires_grad}


def test_the_checkpoint_holds_what_the_parent_writes_beside_the_model(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = Trainer(tiny_llama, arguments(tmp_path / "plain"), processing_class=tiny_tokenizer)
        plain.save_model()
    model = get_peft_model(tiny_llama, LoraConfig(**CONFIG))
    trainer(model, tmp_path / "lora", processing_class=tiny_tokenizer).save_model()
    of_the_model = {"model.safetensors", "config.json", "generation_config.json"}
    of_the_adapter = {"adapter_model.safetensors", "adapter_config.json", "lorakit.json"}
    assert names_in(tmp_path / "plain") - of_the_model == names_in(tmp_path / "lora") - of_the_adapter - {"README.md"}


def test_only_the_process_that_should_save_writes(tiny_llama: Any, tmp_path: Path) -> None:
    lora = trainer(get_peft_model(tiny_llama, LoraConfig(**CONFIG)), tmp_path / "runs")

    class Elsewhere:
        should_save, output_dir = False, str(tmp_path / "runs")

    lora.args = Elsewhere()
    lora._save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_a_quantized_base_is_marked_only_while_the_parent_looks(tiny_llama: Any, tmp_path: Path) -> None:
    seen = []

    class Looking(Trainer):
        def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
            seen.append(model._hf_peft_config_loaded)
            super().__init__(model, *args, **kwargs)

    class Looked(LoraTrainerMixin, Looking):
        pass

    trainer(get_peft_model(tiny_llama, LoraConfig(**CONFIG)), tmp_path, kind=Looked)
    assert seen.pop() is False
    tiny_llama.is_quantized = True
    tiny_llama.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    trainer(PeftModel(tiny_llama), tmp_path, kind=Looked)
    assert seen.pop() is True
    assert tiny_llama._hf_peft_config_loaded is False
    assert "_hf_peft_config_loaded" not in vars(tiny_llama)


def test_a_model_without_adapters_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a LlamaForCausalLM without an adapter; call get_peft_model"):
        trainer(tiny_llama, tmp_path)
    with pytest.raises(ConfigError, match="a dict and a LlamaForCausalLM"):
        trainer(tiny_llama, tmp_path, peft_config={"r": 2})
    with pytest.raises(ConfigError, match="a LoraConfig and a str"):
        trainer("gpt2", tmp_path, peft_config=LoraConfig(**CONFIG))


def test_a_frozen_adapter_is_not_trained_in_silence(tiny_llama: Any, tmp_path: Path) -> None:
    fresh = get_peft_model(tiny_llama, LoraConfig(**CONFIG, init_lora_weights=False))
    fresh.save_pretrained(tmp_path / "adapter")
    base = PeftModel.from_pretrained(fresh.unload(), tmp_path / "adapter")
    lora = trainer(base, tmp_path)
    assert lora.evaluate()["eval_loss"] > 0
    with pytest.raises(ConfigError, match="Load 'default' with is_trainable=True"):
        lora.train()
    base.set_requires_grad("default")
    lora.train()


def test_a_checkpoint_of_something_else_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama, LoraConfig(**CONFIG))
    lora = trainer(model, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty: this checkpoint has no adapter default; nothing was read from it"):
        lora._load_from_checkpoint(str(tmp_path / "empty"))
    lora.save_model(str(tmp_path / "less"))
    held = load_file(tmp_path / "less" / "adapter_model.safetensors")
    held.pop(sorted(held)[0])
    from safetensors.torch import save_file

    save_file(held, tmp_path / "less" / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "less" / "lorakit.json").unlink()
    with pytest.raises(
        RunError, match=r"less: not a checkpoint of this adapter: 1 key\(s\) do not match, e\.g\. .*lora_A"
    ):
        lora._load_from_checkpoint(str(tmp_path / "less"))


def test_deepspeed_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    class Partitioned(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.is_deepspeed_enabled = True

    class LoraPartitioned(LoraTrainerMixin, Partitioned):
        pass

    with pytest.raises(NotYetSupported, match="DeepSpeed") as refused:
        trainer(get_peft_model(tiny_llama, LoraConfig(**CONFIG)), tmp_path, kind=LoraPartitioned)
    assert refused.value.what == "deepspeed"


def test_the_mixin_must_stand_before_the_trainer() -> None:
    class Between:
        pass

    class Fine(Between, LoraTrainerMixin, Trainer):
        pass

    assert issubclass(Fine, LoraTrainerMixin)
    with pytest.raises(ConfigError, match=r"LoraTrainerMixin must precede .* class Wrong\(LoraTrainerMixin, Trainer\)"):

        class Wrong(Trainer, LoraTrainerMixin):
            pass


def test_the_adapter_of_a_checkpoint_names_no_other_model(tiny_llama: Any, tmp_path: Path) -> None:
    lora = trainer(get_peft_model(tiny_llama, LoraConfig(**CONFIG)), tmp_path)
    lora.save_model()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] in (None, "")
    assert isinstance(lora.model, nn.Module)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["peft_installed", "peft_absent"])
def test_both_trainers(peft: bool, tiny_model_directory: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    runs = tmp_path / "runs"
    runs.mkdir()
    assert run("training", "mixin", tiny_model_directory, runs, peft=peft, links=tmp_path / "links") == TRAINING


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False], ids=["peft_installed", "peft_absent"])
def test_a_base_in_four_bits(peft: bool, tiny_model_directory: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    files = tmp_path / "files"
    files.mkdir()
    assert run("quantized", "mixin", tiny_model_directory, files, peft=peft, links=tmp_path / "links") == FOUR_BITS
