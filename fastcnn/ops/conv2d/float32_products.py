"""Convolutions and linear layers of half types whose products are in float32, where that is faster.

    y = round(conv2d(float(x), float(weight)))        dx and dweight likewise, from float(dy)

oneDNN's sums of bfloat16 products are float32 too: either way each value is rounded once. Where a
processor multiplies bfloat16 slower than float32, or has to emulate it, its products cost more than
converting what a convolution reads and writes. Nothing is kept in float32: the copies are freed
behind their convolution.

PyTorch's time over that of float32 with its conversions, 8 images in channels_last, 2 cores of a
Xeon (model 207 without AMX), torch 2.13; forward, and backward of both, in turns with nothing
beside it. a: multiply-adds for each value of x and y.

                                              bfloat16 by AVX512-BF16    by AVX-512 without it
                                        a      forward    backward        forward    backward
    16 to 96, 1x1, 112 x 112           14         0.61        0.83           1.28        1.61
    24 to 144, 1x1, 56 x 56            21         0.95        1.45           1.53        2.84
    64 to 64, 1x1, 56 x 56             32         0.95        1.22           2.82        2.79
    64 to 256, 1x1, 56 x 56            51         1.29        1.05           3.08        2.91
    256 to 64, 1x1, 56 x 56            51         1.02        1.03           2.70        2.62
    64 to 384, 1x1, 14 x 14            55         1.20        1.29           2.92        2.87
    160 to 960, 1x1, 7 x 7            137         1.43        1.34           3.42        3.24
    32 to 32, 3x3, 56 x 56            144         1.50        1.59           4.07        3.77
    128 to 128, 3x3, 28 x 28          576         1.75        1.74           4.46        4.51

So the rule: with AVX512-BF16 from Intel, and no AMX, from 40 multiply-adds a value on, in backward
from 18; on x86 without such instructions always. With AMX, and with AVX512-BF16 from AMD, never:
has_fast_bf16 of csrc/cpu/capability.h. float16 always: even with AVX512-FP16 PyTorch's
forward, dx and dw of the last row take 2.0, 1.5 and 900 times as long.

Linear layers follow the same rule, one thread of that Xeon beside other work, bfloat16 by
AVX512-BF16. A weight in float32, as under autocast, is read as it is, which PyTorch rounds at each
call; one in bfloat16 is converted, and counted with the values.

                                        a   float32 weight        a   bfloat16 weight
                                            forward  backward         forward  backward
    8 rows, 576 to 1024               369      1.57      1.44       8    0.64      0.78
    16 rows, 1024 to 1024             512      1.19      1.69      16    0.68      0.97
    32 rows, 1024 to 1024             512      1.34      1.79      30    0.95      1.23
    64 rows, 1024 to 1024             512      1.48      1.78      57    1.21      1.39
    25088 rows, 32 to 32               16      0.89      1.15      16    0.95      1.14
    25088 rows, 96 to 96               48      1.31      1.49      48    1.30      1.55
    25088 rows, 96 to 384              77      0.96      1.31      77    1.14      1.37
    392 rows, 768 to 3072             614      1.78      1.71     239    1.65      1.73
"""

import platform
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn import _C
from fastcnn.common.constant_result import constant_result
from fastcnn.common.conv_geometry import ConvGeometry


class Least(NamedTuple):
    """From how many multiply-adds a value on the products are in float32."""

    forward: int
    backward: int


def _least() -> dict[torch.dtype, Least]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}  # nothing was measured there
    found = {torch.float16: Least(0, 0)}
    if not _C.has_fast_bf16():
        native = torch.cpu._is_avx512_bf16_supported()
        found[torch.bfloat16] = Least(40, 18) if native else Least(0, 0)
    return found


LEAST = _least()
_convert = torch.ops.prims.convert_element_type.default


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this processor is slower at a half type than at float32."""
    return dtype in LEAST


@constant_result
def is_exporting() -> bool:
    """Whether a program is being made, which other processors run too."""
    return torch.compiler.is_exporting() or torch.jit._trace.is_tracing()


def in_backward(t: Tensor) -> Tensor:
    """Return t in float32 for backward.

    Under torch.compile by another operator than forward's: AOTAutograd would find the same one on
    the same tensor there, and keep its result.
    """
    if torch.compiler.is_compiling():
        return _convert(t, torch.float32)
    return t.float()


def pays(x: Tensor, added: int, values: int, backward: bool = False) -> bool:
    """Whether so many multiply-adds are in float32, where x and so many values are converted."""
    least = LEAST.get(x.dtype)
    if least is None or x.device.type != "cpu" or is_exporting():
        return False
    return added >= least[backward] * values


def in_float32(x: Tensor, weight: Tensor, g: ConvGeometry, backward: bool = False) -> bool:
    """Whether the products of a convolution of x are in float32, x being of a half type."""
    c_out, c_in, kh, kw = weight.shape
    pixels = g.stride[0] * g.stride[1]  # of x for each of y
    added, values = c_out * c_in * kh * kw, pixels * c_in * g.groups + c_out
    return pays(x, added, values, backward)
