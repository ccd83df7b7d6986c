"""The weight gradient in bfloat16 by the processor's dot product, against PyTorch in float64."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from support.seeds import seeded
from support.tolerance import assert_rounded, walk
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn import _C
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv2d import float32_products

needs_bf16_dot = pytest.mark.skipif(
    not _C.has_bf16_dot(), reason="this processor has no AVX512-BF16, or has AMX beside it"
)


class Conv(NamedTuple):
    """Sizes of a convolution, and why it is in the list."""

    n: int
    c_in: int
    h: int
    w: int
    c_out: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    reason: str


ONE, ZERO = (1, 1), (0, 0)
CONVS = [
    Conv(
        1, 1, 1, 1, 1, ONE, ONE, ZERO, ONE, "one value of everything: an odd pixel has no partner"
    ),
    Conv(2, 32, 5, 5, 32, ONE, ONE, ZERO, ONE, "whole tiles"),
    Conv(2, 33, 5, 5, 31, (3, 3), ONE, ONE, ONE, "one channel more and one less than a tile"),
    Conv(1, 7, 9, 4, 50, (3, 3), ONE, ONE, ONE, "the last panel of output channels is half empty"),
    Conv(3, 48, 9, 8, 40, (3, 3), (2, 2), ONE, ONE, "downsampling, odd and even size"),
    Conv(3, 40, 9, 8, 48, ONE, (2, 2), ZERO, ONE, "a projection: every other pixel"),
    Conv(2, 32, 9, 8, 32, (1, 3), (1, 2), (0, 1), ONE, "unequal sides"),
    Conv(2, 32, 9, 8, 32, (3, 3), ONE, (2, 2), (2, 2), "dilation"),
    Conv(
        2, 32, 4, 3, 32, (3, 3), ONE, (4, 4), ONE, "more padding than kernel: rows of zeros alone"
    ),
    Conv(2, 32, 7, 7, 32, (7, 7), ONE, (3, 3), ONE, "49 taps, at most of which a border cuts"),
    Conv(3, 32, 21, 19, 32, (3, 3), ONE, ONE, ONE, "1197 pixels: several chunks, a short last one"),
    Conv(8, 64, 29, 28, 64, ONE, ONE, ZERO, ONE, "6496 pixels: splits, summed at the end"),
    Conv(1, 544, 3, 3, 288, (3, 3), ONE, ONE, ONE, "more tiles than a task takes, both ways"),
]


def operands(conv: Conv, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x and a weight of the sizes, all channels_last."""
    generator = seeded(0)
    x = torch.randn(conv.n, conv.c_in, conv.h, conv.w, generator=generator)
    weight = torch.randn(conv.c_out, conv.c_in, *conv.kernel, generator=generator)
    y = nn.functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)
    dy = torch.randn(y.shape, generator=generator)
    dy, x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (dy, x, weight))
    return dy, x, weight


def by_torch(dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, conv.stride, conv.padding, conv.dilation, False, ZERO, 1,
        (False, True, False),
    )[1]  # fmt: skip


def by_fastcnn(dy: Tensor, x: Tensor, conv: Conv) -> Tensor:
    how = (*conv.kernel, *conv.stride, *conv.padding, *conv.dilation)
    return torch.ops.fastcnn.conv2d_bwd_weight(dy, x, *how)


@needs_bf16_dot
@pytest.mark.parametrize("conv", CONVS, ids=[c.reason for c in CONVS])
def test_against_float64(conv: Conv) -> None:
    dy, x, weight = operands(conv)
    actual = by_fastcnn(dy, x, conv)
    dy, x, weight = dy.double(), x.double(), weight.double()
    exact, size = by_torch(dy, x, weight, conv), by_torch(dy.abs(), x.abs(), weight, conv)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_rounded("dweight", actual, exact, walk(dy[:, 0].numel(), torch.bfloat16) * size)


@needs_bf16_dot
def test_the_same_bits_on_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for conv in CONVS[-2:]:
            dy, x, _ = operands(conv)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(by_fastcnn(dy, x, conv))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


@needs_bf16_dot
def test_an_empty_batch_has_gradient_zero() -> None:
    conv = CONVS[1]._replace(n=0)
    dy, x, weight = operands(conv)
    assert torch.equal(by_fastcnn(dy, x, conv), torch.zeros_like(weight))


class Calls(TorchDispatchMode):
    """Counts calls by operator name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def calls_of_a_chain(channels: int, dtype: torch.dtype, layout: torch.memory_format) -> list[str]:
    conv = nn.Conv2d(channels, channels, 1, bias=False, dtype=dtype).to(memory_format=layout)
    x = torch.randn(2, channels, 4, 5, dtype=dtype).to(memory_format=layout)
    with Calls() as calls:
        conv_bn_act(x, [(conv, BatchNormAct2d(channels))]).sum().backward()
    return calls.names


@needs_bf16_dot
def test_chains_use_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "LEAST", {})  # as on AMD's
    bf16, nhwc = torch.bfloat16, torch.channels_last
    own = "fastcnn::conv2d_bwd_weight"
    assert own in calls_of_a_chain(64, bf16, nhwc)
    assert own in calls_of_a_chain(24, bf16, nhwc)  # three quarters of a tile
    assert own not in calls_of_a_chain(16, bf16, nhwc)  # half of every tile would be empty
    assert own not in calls_of_a_chain(64, torch.float32, nhwc)
    assert own not in calls_of_a_chain(64, bf16, torch.contiguous_format)


def test_a_lower_level_does_without() -> None:
    # FASTCNN_CPU_CAPABILITY is how a machine's results are made comparable with another's.
    code = "from fastcnn import _C; print(_C.has_bf16_dot())"
    environment = os.environ | {"FASTCNN_CPU_CAPABILITY": "baseline"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
