"""Small models and a small tokenizer, made on the spot: no file, no network.

A fixture gives a fresh object each time, so a test may change it. Weights are random with a fixed seed.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import sampling

if not Path("/proc/driver/nvidia/version").exists():  # before anything imports triton, which asks only then
    os.environ.setdefault("TRITON_INTERPRET", "1")

for _name in ("LC_ALL", "LC_CTYPE", "PYTHONIOENCODING", "PYTHONUTF8", "NO_COLOR"):
    os.environ.pop(_name, None)
os.environ.update(LANG="C.UTF-8", TERM="xterm")  # text is compared as a terminal with UTF-8 shows it

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 512

_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "user assistant system hello world, what is two plus two? It is four.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    "Low-rank adaptation freezes the weights and trains two small matrices, A and B.",
]


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.register(sampling, "sampling")


def pytest_collection_finish() -> None:
    """Leave what 38,000 cases hold out of every later collection of garbage, each of which would take a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def make_tiny_tokenizer(_tokenizer_json: str) -> Callable[[], Any]:
    """A function that returns a new `tiny_tokenizer`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    def make() -> Any:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_tokenizer_json),
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    return make


@pytest.fixture
def tiny_tokenizer(make_tiny_tokenizer: Callable[[], Any]) -> Any:
    """A byte-level BPE of at most 512 tokens with a ChatML template; end of text and padding are `<|endoftext|>`."""
    return make_tiny_tokenizer()


def _seeded(make: Any) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture
def tiny_llama() -> Any:
    """A Llama of two layers, width 32, grouped queries, tied embeddings; it takes the ids of `tiny_tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


@pytest.fixture
def wide_model_directory(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """Like `tiny_model_directory`, with widths that are multiples of 64, as the kernels of quantizers require."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path / "wide-llama"
    _seeded(lambda: LlamaForCausalLM(config)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_gpt2() -> Any:
    """A GPT-2 of two layers, width 32 (Conv1D sites); it takes the ids of `tiny_tokenizer`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    return _seeded(lambda: GPT2LMHeadModel(config))


@pytest.fixture
def tiny_model_directory(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A directory with `tiny_llama` and `tiny_tokenizer`, as save_pretrained writes them."""
    folder = tmp_path / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def save_adapter(tmp_path: Path, tiny_model_directory: Path) -> Callable[..., Path]:
    """Save an adapter of the model in `tiny_model_directory` whose B, or LoRA-XS's R, is random, drawn from `seed`."""

    def save(name: str, seed: int = 1, *, spread: float = 0.3, model: Any = None, **fields: Any) -> Path:
        import torch

        from lorakit import core, hub
        from lorakit.config import LoraConfig

        base = hub.load_model(tiny_model_directory) if model is None else model
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields})
        core.attach(base, config, "made", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in core.trainable_parameters(base, "made"):
            if any(name in path for name in ("lora_B", "lora_embedding_A", "lora_R")):
                parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        core.save_adapter(base, tmp_path / name, "made", facts={"base_name": "tiny"}, allow=("nonfinite",))
        core.detach(base, "made")
        return tmp_path / name

    return save
