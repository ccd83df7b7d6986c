"""Triton kernels, for NVIDIA GPUs; imported by what launches them, not at import."""
