"""Triton kernels without a GPU: its interpreter, mended where it is wrong, or the card there is.

conftest.py sets TRITON_INTERPRET before Triton is imported, where there is no GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton.language as tl
from card import DEVICE
from torch import Tensor
from triton import knobs
from triton.runtime import interpreter

from fastcnn.ops.norm import Norm

INTERPRETED = knobs.runtime.interpret


def _from_bits(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """bfloat16 as float32: the interpreter keeps its bits in uint16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(handle.data.copy()).view(torch.bfloat16)
    return interpreter.TensorHandle(bits.float().numpy(), tl.float32)


def _mend() -> None:
    """In Triton 3.6 to 3.9 tl.dot multiplies the bits, and rounding to bfloat16 cuts them off."""
    builder = interpreter.InterpreterBuilder
    dot, truncate = builder.create_dot, builder.create_fp_trunc

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        return dot(self, _from_bits(a), _from_bits(b), *rest)

    def create_fp_trunc(self, src, to):  # type: ignore[no-untyped-def]
        if src.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return truncate(self, src, to)
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)

    builder.create_dot, builder.create_fp_trunc = create_dot, create_fp_trunc


if INTERPRETED:
    _mend()


def channels_last(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers on the device, in channels_last."""
    t = torch.randn(sizes).to(dtype).contiguous(memory_format=torch.channels_last)
    return t.to(DEVICE)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 is multiplied as such, set by the new API: cudnn.allow_tf32 raises."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


def norm_of(channels: int, dtype: torch.dtype = torch.float32) -> Norm:
    """A batch norm with statistics in float32, weight and bias in dtype, on the device."""
    mean, weight, bias = torch.randn(3, channels).to(DEVICE)
    var = torch.rand(channels).to(DEVICE) + 0.5
    return Norm(mean, var, weight.to(dtype), bias.to(dtype), eps=1e-3)


def normed(t: Tensor, norm: Norm) -> Tensor:
    """norm(t) in t's type, centred first."""
    mean, var, weight, bias = (
        None if v is None else v.to(t.dtype)[:, None, None] for v in norm[:4]
    )
    assert mean is not None
    assert var is not None
    z = (t - mean) / (var + norm.eps).sqrt()
    z = z if weight is None else z * weight
    return z if bias is None else z + bias
