"""Convolutions whose every output row or column reads padding only, which end a process in oneDNN.

Rows do so on AMX, in bfloat16 and in 8 bits; columns on every processor.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import unit_roundoff

from fastcnn.functional import ConvBnActStep, conv_bn_act
from fastcnn.ops.conv2d.onednn_workarounds import onednn_crashes

# Kernels of 5 with a dilation of 2 around one pixel, moved by 3: it is read by none of them.
ROWS = {"size": (1, 5), "stride": (3, 1), "padding": (5, 6)}
COLUMNS = {"size": (5, 1), "stride": (1, 3), "padding": (6, 5)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_reads_padding_only_is_the_bias(
    groups: int, given: dict[str, tuple[int, int]], dtype: torch.dtype, layout: str
) -> None:
    g = seeded(0)
    x = torch.randn(2, 34, *given["size"], generator=g).to(dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(6, 34 // groups, 5, 5, generator=g).to(dtype)
    assert onednn_crashes(x, weight, given["stride"], given["padding"], (2, 2))
    bias, mean, var = torch.randn(6, generator=g).to(dtype), torch.zeros(6), torch.ones(6)
    step = ConvBnActStep(weight, bias, given["stride"], given["padding"], 2, groups, mean, var)
    want = (bias.double() / (1 + step.eps) ** 0.5).relu()[None, :, None, None]
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            x.requires_grad_(grads)
            y = conv_bn_act(x, [step])
        # The scale in float32, the bias rounded once more, or the convolution's output.
        limit = want * (4 * unit_roundoff(torch.float32) + 2 * unit_roundoff(dtype))
        assert ((y.double() - want).abs() <= limit).all()


def test_which_they_are() -> None:
    sizes = itertools.product((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3), (0, 1, 2, 4, 5), (1, 2, 3))
    counts = [0, 0]
    for size, kernel, stride, padding, dilation in sizes:
        if size + 2 * padding <= dilation * (kernel - 1):
            continue  # no output
        for swap in (False, True):
            x, weight = torch.ones(1, 1, size, 6).double(), torch.ones(1, 1, kernel, 1).double()
            pairs = (stride, 1), (padding, 0), (dilation, 1)
            if swap:
                x, weight = x.mT.contiguous(), weight.mT.contiguous()
                pairs = tuple(pair[::-1] for pair in pairs)
            nothing = not F.conv2d(x, weight, None, *pairs).any()
            assert onednn_crashes(x, weight, *pairs) is nothing, (size, kernel, *pairs)
            counts[nothing] += 1
    assert min(counts) > 50
