"""Fused operations on tensors: each file says first in plain PyTorch what is computed, then computes it fast."""
