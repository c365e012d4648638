"""Fused tensor operations with their backward passes; `tests/ops/references.py` has each in plain PyTorch."""
