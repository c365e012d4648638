"""aLoRA with PEFT's API: the offsets and outputs of the installed `peft`, and correct ones if peft's are wrong."""

from __future__ import annotations

import copy
from typing import Any

import peft as real
import pytest
import torch
from torch import Tensor, nn

from lorakit import peft
from lorakit.config import LoraConfig
from lorakit.errors import RouteError
from lorakit.peft.tuners.lora import variants as ours

from .models import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # peft asks for it
TOKENS = [3, 4]
WORDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "alora_invocation_tokens": TOKENS}
IDS = torch.tensor([[9, 8, 7, 11, 12, 13, 14], [9, 8, 3, 4, 12, 13, 14], [3, 4, 9, 8, 3, 4, 14]])
DRAWN = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}


def pair(base: Any, targets: list[str], **names: dict[str, Any]) -> tuple[Any, Any]:
    """Return our model and the installed peft's with the same values; adapters other than "default" by name."""
    mine = peft.get_peft_model(copy.deepcopy(base), LoraConfig(**WORDS, target_modules=targets))
    theirs = real.get_peft_model(copy.deepcopy(base), real.LoraConfig(**WORDS, target_modules=targets))
    for name, fields in names.items():
        words = {**WORDS, "target_modules": targets, **fields}
        mine.add_adapter(name, LoraConfig(**words))
        theirs.add_adapter(name, real.LoraConfig(**words))
    randomise(mine)
    numbers = dict(mine.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(numbers[name])
    return mine.eval(), theirs.eval()


def logits(model: nn.Module, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, **given}).logits


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_the_same_numbers(tiny_llama: Any, tiny_gpt2: Any) -> None:
    for base, targets in ((tiny_llama, ["q_proj", "down_proj"]), (tiny_gpt2, ["c_attn", "c_fc"])):
        mine, theirs = pair(base, targets)
        assert close(logits(mine), logits(theirs))
        for model in (mine, theirs):
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
        wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
        assert wanted
        for name, parameter in mine.named_parameters():
            if name in wanted:
                assert close(parameter.grad, wanted[name]), name


def test_rows_of_a_batch_and_generation(tiny_llama: Any) -> None:
    other = {"alora_invocation_tokens": [9]}
    mine, theirs = pair(tiny_llama, ["q_proj", "v_proj"], other=other, plain={"alora_invocation_tokens": None})
    for names in (["default", "other", "plain"], ["__base__", "default", "other"], ["plain", "__base__", "default"]):
        assert close(logits(mine, adapter_names=names), logits(theirs, adapter_names=names))
        found = mine.generate(input_ids=IDS, adapter_names=names, **DRAWN)
        assert found.tolist() == theirs.generate(input_ids=IDS, adapter_names=names, **DRAWN).tolist()
    found = mine.generate(IDS, **DRAWN)
    assert found.tolist() == theirs.generate(IDS, **DRAWN).tolist()
    assert found.tolist() == mine.generate(IDS, use_cache=False, **DRAWN).tolist()


def test_offsets_that_the_caller_gives(tiny_llama: Any) -> None:
    mine, theirs = pair(tiny_llama, ["q_proj", "v_proj"])
    for offsets in ([None, 5, 3], [2, None, 7], [1, 1, 1]):
        assert close(logits(mine, alora_offsets=offsets), logits(theirs, alora_offsets=offsets))
        found = mine.generate(input_ids=IDS, alora_offsets=offsets, **DRAWN)
        assert found.tolist() == theirs.generate(input_ids=IDS, alora_offsets=offsets, **DRAWN).tolist()
    with mine.disable_adapter(), theirs.disable_adapter():
        assert close(logits(mine), logits(theirs))
    beams = mine.generate(input_ids=IDS, num_beams=2, **DRAWN)
    assert beams.shape[0] == 3
    with pytest.raises(ValueError, match="Beam search not yet supported"):
        theirs.generate(input_ids=IDS, num_beams=2, **DRAWN)


def test_the_functions_that_people_import() -> None:
    configs = {"a": LoraConfig(**WORDS), "b": LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[9])}
    theirs = {name: real.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=c.alora_invocation_tokens)
              for name, c in configs.items()}  # fmt: skip
    wanted = real.tuners.lora.variants.calculate_alora_offsets
    for names in (None, ["a", "b", "__base__"], ["b", "b", "a"]):
        assert ours.calculate_alora_offsets(configs, "a", IDS, names) == wanted(theirs, "a", IDS, names)
    assert ours.calculate_alora_offsets(configs, "a", None) == []
    with pytest.warns(UserWarning, match="Adapter 'c' not found in peft_config. Using base model for row 0"):
        assert ours.calculate_alora_offsets(configs, "c", IDS[:1]) == [None]


def test_embeddings_alone_run_on_the_base_with_a_warning(tiny_llama: Any) -> None:
    mine, _ = pair(tiny_llama, ["q_proj", "v_proj"])
    embedded = mine.get_base_model().get_input_embeddings()(IDS)
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets when only inputs_embeds are provided"):
        found = logits(mine, input_ids=None, inputs_embeds=embedded)
    with mine.disable_adapter():
        assert close(found, logits(mine))
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets during generate as input_ids"):
        mine.generate(inputs_embeds=embedded, max_new_tokens=2, pad_token_id=0)
    with pytest.warns(UserWarning, match="offsets during generate"):
        assert ours.get_alora_offsets_for_generate(mine, inputs_embeds=embedded)["alora_offsets"] is None
    assert ours.get_alora_offsets_for_forward(mine, IDS)["alora_offsets"] == [None, 5, 3]
    assert ours.get_alora_offsets_for_generate(mine, IDS)["alora_offsets"] == [None, 5, 3]
    with pytest.raises(RouteError, match="Pass input_ids"):
        mine.get_base_model()(inputs_embeds=embedded)


def test_end_tokens_as_padding_and_as_invocation(tiny_llama: Any) -> None:
    """PEFT takes the padding behind the text for the invocation; here the mask tells them apart."""
    mine, theirs = pair(tiny_llama, ["q_proj"], ends={"alora_invocation_tokens": [2]})
    for model in (mine, theirs):
        model.set_adapter("ends")
    text, padded = torch.tensor([[5, 2, 6, 7]]), torch.tensor([[5, 2, 6, 7, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    alone = logits(mine, input_ids=text)
    assert close(alone, logits(theirs, input_ids=text))
    assert close(alone, logits(mine, input_ids=padded, attention_mask=mask)[:, :4])
    assert not close(alone, logits(theirs, input_ids=padded, attention_mask=mask)[:, :4])


def test_what_is_said_of_tied_weights(tiny_llama: Any) -> None:
    with pytest.warns(
        UserWarning, match="Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
    ):
        peft.get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="You have requested `ensure_weight_tying`, but no tied modules are added"):
        peft.get_peft_model(
            copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True)
        )


def test_offsets_over_a_bare_tuner(tiny_llama: Any) -> None:
    mine, _ = pair(tiny_llama, ["q_proj", "v_proj"])
    embedded = mine.get_base_model().get_input_embeddings()(IDS)
    with torch.no_grad(), mine.base_model._enable_peft_forward_hooks(alora_offsets=[None, 5, 3]):
        found = mine.base_model(inputs_embeds=embedded).logits
    assert close(found, logits(mine))
