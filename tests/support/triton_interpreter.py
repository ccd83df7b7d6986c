"""Triton kernels without a GPU: its interpreter, mended where it is wrong, or the GPU there is.

conftest.py sets TRITON_INTERPRET before Triton is imported, where there is no GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton.language as tl
from support.activations import ACTS
from support.device import DEVICE
from support.norm_cases import STEEPEST
from support.tolerance import walk
from torch import Tensor
from triton import knobs
from triton.runtime import interpreter

from fastcnn.common.batch_norm_params import Norm

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


class Bounded(NamedTuple):
    """Exact values in float64, and what a kernel's may differ by from each (tolerance.py)."""

    exact: Tensor
    error: Tensor


# The relative error of a few operations in float32.
ONE = walk(1, torch.float32)


def given(t: Tensor) -> Bounded:
    """Values that are what they are."""
    t = t.double()
    return Bounded(t, torch.zeros_like(t))


def per_channel(t: Tensor | None, missing: float) -> Tensor:
    """A norm's vector in float64, broadcast over images."""
    t = torch.tensor([missing], device=DEVICE) if t is None else t
    return t.double()[:, None, None]


def centre(norm: Norm) -> tuple[Tensor, Tensor]:
    """A norm's mean and standard deviation, as above."""
    return per_channel(norm.mean, 0), (per_channel(norm.var, 1) + norm.eps).sqrt()


def before_act(t: Bounded, norm: Norm | None, residual: Tensor | None = None) -> Bounded:
    """norm(t) + residual in float32, each where given."""
    exact, error, size = t.exact, t.error, t.exact.abs()
    if norm is not None:
        mean, std = centre(norm)
        gain, shift = per_channel(norm.weight, 1) / std, per_channel(norm.bias, 0)
        size = (size + mean.abs()) * gain.abs() + shift.abs()
        exact, error = (exact - mean) * gain + shift, error * gain.abs()
    if residual is not None:
        exact, size = exact + residual.double(), size + residual.double().abs()
    return Bounded(exact, error + ONE * size)


def activated(z: Bounded, act: str) -> Bounded:
    """act(z), computed in float32."""
    y = ACTS[act](z.exact)
    return Bounded(y, STEEPEST * z.error + ONE * y.abs())
