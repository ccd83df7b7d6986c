"""What chains do about oneDNN's mistakes."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from support.chains import Chain, baseline, check_float64, conv_bn
from support.paths import TESTS
from support.seeds import seed_all
from support.tolerance import assert_rounded, walk
from torch import nn

from fastcnn.nn import BatchNormAct2d

# Weight gradients of narrow 1x1 convolutions with a stride, in a process whose malloc looks at the
# neighbourhood of every block that is freed. Without detour it ends in "free(): invalid pointer".
TRAIN = """
import torch
from support.chains import Chain, conv_bn
torch.set_num_threads(2)
for c_in, c_out in ((3, 1), (3, 5), (7, 5), (1, 1)):
    chain = Chain(conv_bn(c_in, c_out, 1, "relu", (1, 2))).bfloat16()
    chain = chain.to(memory_format=torch.channels_last)
    for _ in range(200):
        x = torch.randn(1, c_in, 10, 4).bfloat16().to(memory_format=torch.channels_last)
        chain(x).sum().backward()
"""


def test_narrow_pointwise_convolutions_with_a_stride_keep_to_their_memory() -> None:
    debug = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    env = {**os.environ, **debug, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", TRAIN], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "preloaded" not in done.stderr, "nobody looked at the blocks: glibc's debugging malloc"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_their_gradients(layout: str) -> None:
    seed_all(0)
    for c_in in (1, 3, 15):
        check_float64(Chain(conv_bn(c_in, 5, 1, "silu", 2)), (2, c_in, 7, 6), layout=layout)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_that_read_padding_only(groups: int, dtype: torch.dtype) -> None:
    # Columns -3 and -1, -1 and 1, 1 and 3 of an image that has column 0: oneDNN ends the process.
    seed_all(0)
    conv = nn.Conv2d(4, 8, 2, stride=(1, 2), padding=3, dilation=2, groups=groups)
    chain = Chain((conv, BatchNormAct2d(8))).eval().to(dtype, memory_format=torch.channels_last)
    exact, bn = baseline(chain).double(), copy.deepcopy(chain.bns[0]).double()
    x = torch.randn(2, 4, 5, 1).to(dtype).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(2, 8, 9, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    gain = (bn.weight / (bn.running_var + bn.eps).sqrt()).abs()
    normed = (conv.bias.double().abs() + bn.running_mean.abs()) * gain + bn.bias.abs()
    normed = normed.detach()[:, None, None]  # in magnitude
    for added in (None, residual):
        want = exact(x.double(), None if added is None else added.double()).detach()
        size = normed + (0 if added is None else added.double().abs())
        error = walk(1, dtype) * size
        assert_rounded("y", chain(x, added).detach(), want, error)
        with torch.no_grad():  # folded: the bias is rounded, and its sum with the residual
            assert_rounded("folded y", chain(x, added), want, error, normed + size)
    chain(x).sum().backward()
    assert conv.weight.grad is not None
    assert not conv.weight.grad.any()  # of zeros
