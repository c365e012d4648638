"""Compiled kernels for what PyTorch does in several passes: written in C for processors, in Triton for CUDA."""
