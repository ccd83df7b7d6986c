"""Memory layouts of converted convolutions: weights, inputs and residuals in any, mixed too."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert
from fastcnn.common.checks import is_channels_last
from fastcnn.convert.codegen import runtime
from fastcnn.ops.conv2d import winograd

NCHW, LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = {"nchw": NCHW, "last": LAST}
CONVS: dict[str, Callable[[], nn.Conv2d]] = {
    "1x1": lambda: nn.Conv2d(16, 16, 1),
    "3x3": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "groups": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4),
}


class Block(nn.Module):
    """relu(norm(conv(x)) + residual), the residual None, x itself, another image or a shortcut."""

    def __init__(self, conv: nn.Conv2d, residual: str) -> None:
        super().__init__()
        self.first = nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(16), nn.ReLU())
        self.conv, self.bn, self.residual = conv, nn.BatchNorm2d(16), residual
        self.down = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        out = self.bn(self.conv(self.first(x)))
        if self.residual == "x":
            out += x
        elif self.residual == "image":
            out += added
        elif self.residual == "shortcut":
            out += self.down(x)
        return F.relu(out)


def check(model: nn.Module, inputs: tuple[Tensor, ...], mode: str, training: bool) -> None:
    """Check strides and values of a model converted in a mode, twice: the second call is kept."""
    dtype = inputs[0].dtype
    plain = copy.deepcopy(model).train(training)
    found = convert(model.train(training), mode=mode)
    for grad in (True,) if training else (True, False):
        for _ in range(2):
            with torch.set_grad_enabled(grad):
                y, expected = found(*inputs), plain(*inputs)
            assert y.stride() == expected.stride()
            if dtype is torch.float64:
                assert_same(y, expected)
            else:
                # Two convolutions in a row, each of 144 products at most in another order: their
                # roundings walk sqrt(144) away, and Winograd's 2.2 times as far (winograd.py). What
                # a norm gives is below 4 here, after which a sum is below 8.
                bound = 2 * (1 + 2.2) * 144**0.5 * torch.finfo(dtype).eps
                torch.testing.assert_close(y, expected, rtol=bound, atol=8 * bound)
        if grad:
            for m in (found, plain):
                m.zero_grad()
            y.square().sum().backward()
            expected.square().sum().backward()
            for (name, p), q in zip(found.named_parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if dtype is torch.float64 and p.grad is not None and q.grad is not None:
                    assert_same(p.grad, q.grad, name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("residual", ["none", "x", "image", "shortcut"])
@pytest.mark.parametrize("kind", CONVS)
def test_strides_and_values_are_pytorch_s(
    kind: str, residual: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "LEAST_GAIN", 0)
    # Else maps as small as these train by PyTorch's operators.
    monkeypatch.setattr(runtime, "too_small", lambda *_: None)
    torch.manual_seed(0)
    drawn = [torch.randn(2, 16, 9, 8, dtype=dtype) for _ in range(2)]
    for of_x, of_first, of_rest, of_added in itertools.product(LAYOUTS.values(), repeat=4):
        if of_added is LAST and residual != "image":
            continue
        model = Block(CONVS[kind](), residual).to(dtype).to(memory_format=of_rest)
        model.first.to(memory_format=of_first)
        inputs = tuple(t.to(memory_format=f) for t, f in zip(drawn, (of_x, of_added), strict=True))
        for mode, training in (
            ("train", True),
            ("train", False),
            ("infer", True),
            ("infer", False),
        ):
            check(copy.deepcopy(model), inputs, mode, training)


@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_depthwise_convolution_alone(mode: str, kernel: int, act: type[nn.Module]) -> None:
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    for of_x, of_weight in itertools.product(LAYOUTS.values(), repeat=2):
        conv = nn.Conv2d(16, 16, kernel, padding=kernel // 2, groups=16)
        model = nn.Sequential(conv, act()).double().to(memory_format=of_weight)
        for training in (True, False):
            check(copy.deepcopy(model), (x.to(memory_format=of_x),), mode, training)


@pytest.mark.parametrize("sizes", [(1, 3, 3), (16, 1, 1), (1, 1, 1), (16, 3, 3), (3, 1, 7)])
def test_the_rule_is_pytorch_s(sizes: tuple[int, ...]) -> None:
    # Told by what torch.convolution answers, of images that are plainly NCHW.
    for layout in LAYOUTS.values():
        weight = nn.Conv2d(sizes[0], 5, sizes[1:]).to(memory_format=layout).weight
        x = torch.randn(2, sizes[0], 9, 8)
        y = torch.conv2d(x, weight)
        assert is_channels_last(y) == (is_channels_last(weight) or is_channels_last(x))
