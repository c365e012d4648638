"""The small random models that peft and lorakit are compared on; the same name gives the same bits each time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, VOCABULARY = 3, 7, 60
_SPREAD = {"initializer_range": 0.2}


def model_named(name: str, seed: int = 0) -> nn.Module:
    """A fresh model in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def inputs_for(name: str, seed: int = 8) -> dict[str, Tensor]:
    """Return arguments of the model's forward, with labels if the model computes a loss."""
    ids = _ids(ROWS, LENGTH, seed)
    if name.startswith("sequential"):
        return {"input": ids}
    if name.startswith("t5"):
        return {"input_ids": ids, "labels": _ids(ROWS, 4, seed)}
    labels = {
        "classes": torch.tensor([0, 2, 1]),
        "tokens": ids % 3,
        "words": ids,
    }
    if name.endswith("-pictures"):
        return {"pixel_values": _numbers(seed, 3, 3, 8, 8), "labels": labels["classes"]}
    if name.endswith("-speech"):
        return {"input_features": _numbers(seed, 3, 4, 16), "labels": ids}
    if name.endswith("-answers"):
        spans = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 3, 4])}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **spans}
    kind = name.rpartition("-")[2]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**given, "labels": labels[kind]} if kind in labels else given


def outputs_of(result: Any) -> dict[str, Tensor]:
    """Every tensor of floats that a forward returned."""
    if isinstance(result, Tensor):
        return {"output": result}
    return {k: v for k, v in result.items() if isinstance(v, Tensor) and v.is_floating_point()}


def loss_of(result: Any) -> Tensor:
    """The model's own loss, or a sum over its outputs that depends on each number in its own way."""
    outputs = outputs_of(result)
    if "loss" in outputs:
        return outputs["loss"]
    return sum(  # type: ignore[return-value]
        (tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).sum() for tensor in outputs.values()
    )


def _ids(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))


def _of(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(vocab_size=VOCABULARY, **sizes))
        with torch.no_grad():  # biases start at zero and norms at one, which would hide mistakes
            for parameter in made.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        return made

    return make


def _sequential() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(VOCABULARY, 12), up=nn.Linear(12, 20), act=nn.Tanh(), head=nn.Linear(20, 7, bias=False)
        )
    )


class _Convolutions(nn.Module):
    """Token vectors through one convolution of each dimension, each as plain as peft's adapters are."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.one = nn.Conv1d(LENGTH, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.mixed = nn.Conv2d(6, 6, 1, groups=groups)
        self.three = nn.Conv3d(1, 4, 3, padding=1)
        self.head = nn.Linear(6, 7)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.one(self.embed(input_ids))  # (rows, 6, 6)
        x = torch.tanh(self.mixed(torch.tanh(self.two(x.unsqueeze(1)))))  # (rows, 6, 6, 6)
        out: Tensor = self.head(
            torch.tanh(self.three(x.unsqueeze(1))).flatten(2).mean(2, keepdim=True).expand(-1, -1, 6)
        )
        return out


class _Attending(nn.Module):
    """Token vectors through torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mha = nn.Embedding(VOCABULARY, 12), nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 7)
        self.requires_grad_(False)  # torch uses another attention kernel, with other rounding, if a weight is trained

    def forward(self, input: Tensor) -> Tensor:
        x = self.embed(input)
        out: Tensor = self.head(self.mha(x, x, x)[0])
        return out


class _Experts(nn.Module):
    """Bare parameters: experts in one tensor, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.matrix = nn.Parameter(torch.randn(3, 20, 12) / 3), nn.Parameter(torch.randn(14, 20) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("nti,eoi->nto", x, self.stack)) @ self.matrix.T


def _bare() -> nn.Module:
    return nn.Sequential(OrderedDict(embed=nn.Embedding(VOCABULARY, 12), experts=_Experts(), head=nn.Linear(14, 7)))


def _parametrised() -> nn.Module:
    """An embedding and a dense layer whose weights are computed from two others in each forward."""
    model = _sequential()
    for module in (model.embed, model.up):
        nn.utils.parametrizations.weight_norm(module)
    return model


def _in_few_bits(storage: str) -> Callable[[], nn.Module]:
    """Return a Llama that is wide enough for quantization kernels, its dense layers in a format of `--quantization`."""

    def make() -> nn.Module:
        from tests.quantized_layers import quantized_linear

        from lorakit.plan.quantized import Quantization

        sizes = {**_LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        model: Any = _of("LlamaForCausalLM", "LlamaConfig", **sizes, tie_word_embeddings=False)()
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                model.set_submodule(path, quantized_linear(module, Quantization(storage)))
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = storage == "nf4", storage == "int8"  # peft asks the model
        return model

    return make


def _unnamed() -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))


_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0, **_SPREAD}
_BERT = dict(hidden_size=16, intermediate_size=24, max_position_embeddings=16, pad_token_id=0, **_HEADS, **_SPREAD)
_ROBERTA = {**_BERT, "max_position_embeddings": 20}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "eos_token_id": 1}
_OPT = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, max_position_embeddings=16, init_std=0.2, **_HEADS)
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_THREE = {"num_labels": 3}

_MOE = {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
_OSS = {**_MOE, "head_dim": 8, "num_hidden_layers": 2, "sliding_window": 8}
_GEMMA = {**_LLAMA, "head_dim": 8}
_NEOX = {**_BERT, "eos_token_id": 1, "hidden_dropout": 0.0, "rotary_pct": 0.5}
_VIT = dict(hidden_size=16, intermediate_size=24, image_size=8, patch_size=4, num_channels=3, **_HEADS, **_SPREAD)
_WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "init_std": 0.2,
}

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "sequential": _sequential,
    "convolutions": _Convolutions,
    "convolutions-in-groups": lambda: _Convolutions(groups=2),
    "sequential-unnamed": _unnamed,
    "sequential-attention": _Attending,
    "sequential-bare": _bare,
    "sequential-parametrised": _parametrised,
    "gpt2-words": _of("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "gpt2-classes": _of("GPT2ForSequenceClassification", "GPT2Config", **_GPT2, **_THREE, pad_token_id=0),
    "llama-words": _of("LlamaForCausalLM", "LlamaConfig", **_LLAMA, tie_word_embeddings=False),
    "llama-tied-words": _of("LlamaForCausalLM", "LlamaConfig", **_LLAMA, tie_word_embeddings=True),
    "llama-classes": _of("LlamaForSequenceClassification", "LlamaConfig", **_LLAMA, **_THREE),
    "qwen2-words": _of("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA, tie_word_embeddings=True),
    "qwen3-words": _of("Qwen3ForCausalLM", "Qwen3Config", **_GEMMA, tie_word_embeddings=False),
    "gemma-words": _of("GemmaForCausalLM", "GemmaConfig", **_GEMMA, tie_word_embeddings=False),
    "mixtral-words": _of("MixtralForCausalLM", "MixtralConfig", **_MOE, tie_word_embeddings=False),
    "gpt-oss-words": _of("GptOssForCausalLM", "GptOssConfig", **_OSS, tie_word_embeddings=False),
    "neox-words": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_NEOX),
    "vit-pictures": _of("ViTForImageClassification", "ViTConfig", **_VIT, **_THREE),
    "whisper-speech": _of("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
    "opt-words": _of("OPTForCausalLM", "OPTConfig", **_OPT, pad_token_id=0),
    "bert-classes": _of("BertForSequenceClassification", "BertConfig", **_BERT, **_THREE),
    "bert-tokens": _of("BertForTokenClassification", "BertConfig", **_BERT, **_THREE),
    "bert-answers": _of("BertForQuestionAnswering", "BertConfig", **_BERT),
    "bert-features": _of("BertModel", "BertConfig", **_BERT),
    "roberta-classes": _of("RobertaForSequenceClassification", "RobertaConfig", **_ROBERTA, **_THREE),
    "t5-words": _of("T5ForConditionalGeneration", "T5Config", **_T5, initializer_factor=0.5, tie_word_embeddings=True),
    **{f"llama-{storage}-words": _in_few_bits(storage) for storage in ("nf4", "int8", "int8-torchao", "hqq4")},
}
