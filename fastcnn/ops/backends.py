"""What runs each op, on the CPU and on CUDA: for info() and report()."""

# By op: the kernels on the CPU and on CUDA.
BACKENDS = {
    "augment": ("C++", "CUDA C++"),
    "batch_norm_act": ("C++", "CUDA C++"),
    "conv2d_int8": ("oneDNN through PyTorch + C++", "Triton"),
    "conv_bn_act": (
        "oneDNN through PyTorch + C++",
        "cuDNN through PyTorch + CUDA C++, or Triton, as planned",
    ),
    "depthwise_conv2d": ("C++", "CUDA C++"),
    "dropout": ("C++", "CUDA C++"),
    "group_norm_act": ("C++", "CUDA C++"),
    "linear_act": ("oneDNN and BLAS through PyTorch", "cuBLAS through PyTorch"),
    "squeeze_excite": ("C++", "CUDA C++"),
    "upsample": ("C++", "CUDA C++"),
}
