"""Fused tensor operations and their backward passes; `reference.py` implements each of them in plain PyTorch."""
