"""What a launch asks of the device, and its TMA descriptors."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcnn.common.conv_geometry import Pair


def arch_of(t: Tensor) -> int:
    """Return 90 for sm_90; in the interpreter, too, so that its kernels run there."""
    if t.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


def multiprocessors(x: Tensor) -> int:
    """Return the GPU's, on which as many programs run at once at the least."""
    if x.device.type != "cuda":
        return 3  # in the interpreter: fewer than there are tiles, so that programs take several
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def has_descriptors(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, groups: int) -> bool:
    """Whether the convolution is one product of matrices, and the TMA unit can read its operands.

    That has sm_90 on; it takes 16 bytes at a time: rows of channels, first to last.
    """
    return (
        groups == 1
        and (*weight.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0)
        and arch_of(x) >= 90
        and x.shape[1] * x.itemsize % 16 == 0
        and all(t.data_ptr() % 16 == 0 and t.numel() > 0 for t in (x, weight))
    )


def matrix(t: Tensor, *block: int) -> TensorDescriptor:
    """Return [pixels, channels] of an image, or [c_out, c_in] of weights, to be read in blocks."""
    c = t.shape[1]
    return TensorDescriptor(t, [t.numel() // c, c], [c, 1], list(block))


def current_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
