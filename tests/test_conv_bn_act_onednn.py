"""What chains do about oneDNN's mistakes."""

import os
import subprocess
import sys

import pytest
import torch
from chains import Chain, check_float64, conv_bn

# Weight gradients of narrow 1x1 convolutions with a stride, in a process whose malloc looks at the
# neighbourhood of every block that is freed. Without detour it ends in "free(): invalid pointer".
TRAIN = """
import torch
from chains import Chain, conv_bn
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
    env = {**os.environ, **debug, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", TRAIN], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_their_gradients(layout: str) -> None:
    torch.manual_seed(0)
    for c_in in (1, 3, 15):
        check_float64(Chain(conv_bn(c_in, 5, 1, "silu", 2)), (2, c_in, 7, 6), layout=layout)
