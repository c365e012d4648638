"""Small models for the tests of `lorakit.peft`, in addition to `tiny_llama` and `tiny_gpt2` of the top conftest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SIZES = {"vocab_size": 60, "initializer_range": 0.2}
_BERT = {**_SIZES, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(head: str = "SequenceClassification", **more: Any) -> nn.Module:
    """A BERT of two layers with this head, in eval mode."""
    import transformers

    config = transformers.BertConfig(**_BERT, max_position_embeddings=32, **more)
    return _seeded(lambda: getattr(transformers, f"BertFor{head}" if head else "BertModel")(config))


def t5() -> nn.Module:
    """A T5 of two layers, in eval mode."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return _seeded(lambda: T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))


def ids(rows: int = 3, length: int = 7) -> Tensor:
    """Token ids from 3 to 59, (rows, length)."""
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(8))


def randomise(model: nn.Module) -> None:
    """Give every factor different values, also B; otherwise no adapter would change the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()
