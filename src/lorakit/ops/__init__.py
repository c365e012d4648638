"""Fused tensor operations; each module defines its result in plain PyTorch as `reference`."""
