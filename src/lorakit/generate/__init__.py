"""Generation: sampling, the engine over token ids, and text that streams out of tokens.

The engine knows no text and no HTTP; the decoder knows no model. Nothing here imports transformers: a model is
called as any causal language model of that library is, and its own cache of keys and values is used.
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
