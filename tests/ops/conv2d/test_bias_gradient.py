"""A convolution's bias: its gradient is a sum, and costs no second weight gradient."""

from typing import Any

import pytest
import torch
from support.seeds import seeded
from support.tolerance import assert_rounded, walk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv2d.aten import convolve_bwd

aten, fastcnn = torch.ops.aten, torch.ops.fastcnn
GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), 1)


class WeightGradients(TorchDispatchMode):
    """Counts calls that compute a weight's gradient, asked for or with the bias's."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is aten.convolution_backward.default:
            self.count += args[-1][1] or args[-1][2]
        self.count += op is fastcnn.conv2d_bwd_weight.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("channels", "stride", "dtype"),
    [
        (64, 1, torch.bfloat16),  # by conv2d_bwd_weight, where the processor has it
        (64, 1, torch.float32),
        (4, 2, torch.float32),  # onednn_overruns: the weight's gradient is a call of its own
    ],
    ids=str,
)
def test_a_bias_costs_no_second_weight_gradient(
    channels: int, stride: int, dtype: torch.dtype, training: bool
) -> None:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, dtype=dtype)
    conv = conv.to(memory_format=torch.channels_last)
    bn = BatchNormAct2d(channels).train(training)
    x = torch.randn(2, channels, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    y = conv_bn_act(x, [(conv, bn)]).float().square().sum()
    with WeightGradients() as gradients:
        y.backward()
    assert gradients.count == 1
    assert conv.bias is not None
    assert conv.bias.grad is not None
    if training:  # batch norm takes any bias off again
        assert torch.equal(conv.bias.grad, torch.zeros_like(conv.bias))
    else:
        assert (conv.bias.grad != 0).any()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_its_value(dtype: torch.dtype, trained: bool) -> None:
    generator = seeded(0)
    x, dy = (torch.randn(3, 64, 9, 7, generator=generator).to(dtype) for _ in range(2))
    x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    weight = torch.randn(64, 64, 3, 3, generator=generator).to(dtype)
    bias = torch.zeros(64, dtype=dtype)
    with WeightGradients() as gradients:
        _, dweight, dbias = convolve_bwd(dy, x, weight, bias, GEOMETRY, (False, trained, True))
    assert gradients.count == trained
    assert (dweight is not None) is trained
    exact = dy.double()
    error = walk(dy[:, 0].numel(), dtype) * exact.abs().sum((0, 2, 3))
    assert dbias is not None
    assert_rounded("dbias", dbias, exact.sum((0, 2, 3)), error)
