"""Knowledge about transformers' models: shapes from configs, default targets. Does not import torch."""
