"""Generation: sampling, an engine that works on token ids, streaming detokenization, stop strings and JSON schemas.

The engine does not handle text, and the detokenizer does not depend on the model. This package does not import
transformers; it calls a model through the interface of transformers' causal language models and uses the model's
key-value cache.
"""

from lorakit.generate.batch import generate, generate_batch
from lorakit.generate.detokenizing import TextStream, Tokenizer
from lorakit.generate.engine import Engine, context_tokens, rows_are_independent
from lorakit.generate.grammar import JSON_OBJECT, Constraint, GrammarCompiler
from lorakit.generate.passes import embedding_weight
from lorakit.generate.rows import Continuation, Ending, Failure, NewToken, PromptRead
from lorakit.generate.sampling import Sampler, Sampling, TokenLogprobs, logprobs
from lorakit.generate.stop_strings import StopStrings

__all__ = [
    "JSON_OBJECT",
    "Constraint",
    "Continuation",
    "Ending",
    "Engine",
    "Failure",
    "GrammarCompiler",
    "NewToken",
    "PromptRead",
    "Sampler",
    "Sampling",
    "StopStrings",
    "TextStream",
    "TokenLogprobs",
    "Tokenizer",
    "context_tokens",
    "embedding_weight",
    "generate",
    "generate_batch",
    "logprobs",
    "rows_are_independent",
]
