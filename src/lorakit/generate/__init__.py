"""Generation: sampling, the engine over token ids, and streaming of tokens to text.

The engine does not depend on text, the detokenizer not on the model. This package does not import transformers: a model
is called like any of its causal language models, with its own key-value cache.
"""

from lorakit.generate.detokenizing import TextStream, Tokenizer
from lorakit.generate.engine import Ending, NewToken, context_tokens, generate, generate_batch
from lorakit.generate.prefixes import Prefix, read_prefix
from lorakit.generate.sampling import Sampler, Sampling

__all__ = [
    "Ending",
    "NewToken",
    "Prefix",
    "Sampler",
    "Sampling",
    "TextStream",
    "Tokenizer",
    "context_tokens",
    "generate",
    "generate_batch",
    "read_prefix",
]
