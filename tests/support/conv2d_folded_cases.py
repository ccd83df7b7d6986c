"""Convolutions with their batch norms, for the tests of FoldedConv2d."""

from collections.abc import Callable
from typing import Any

import torch
from support.activations import ACTS
from support.chains import randomize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.functional import ConvBnActStep, conv_bn_act
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d


class Pair(nn.Module):
    """A convolution and what stands behind it, folded or module by module."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, act: str = "relu") -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act
        randomize(self)
        self.folded = FoldedConv2d(conv, norm, act)
        self.eval()

    def forward(self, x: Tensor, residual: Tensor | None = None, dies: bool = False) -> Tensor:
        return self.folded(x, residual, dies)

    def plain(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.conv(x) if self.norm is None else self.norm(self.conv(x))
        return ACTS[self.act](y if residual is None else y + residual)

    def step(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same by conv_bn_act, which keeps nothing."""
        c, n = self.conv, self.norm
        ones = torch.ones(c.out_channels)
        norm = (0 * ones, ones, None, None)
        if n is not None:
            norm = (n.running_mean, n.running_var, n.weight, n.bias)
        step = ConvBnActStep(
            c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups,
            *norm, eps=0.0 if n is None else n.eps, act=self.act,
        )  # fmt: skip
        return conv_bn_act(x, [step], residual)


def pair(c_in: int = 4, c_out: int = 6, act: str = "relu", **kwargs: Any) -> Pair:
    kwargs = {"kernel_size": 3, "padding": 1} | kwargs
    return Pair(nn.Conv2d(c_in, c_out, **kwargs), nn.BatchNorm2d(c_out), act)


class Folds(TorchDispatchMode):
    """Counts what runs beside the convolution itself: nothing, where weights were kept."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def operators(run: Callable[[], Any]) -> list[str]:
    with Folds() as found:
        run()
    return found.names


def kept(run: Callable[[], Any]) -> bool:
    # An image of a half type may be converted; folding anew is some products besides.
    passed = ("detach", "_to_copy", "empty_like")
    names = [n for n in operators(run) if not any(word in n for word in passed)]
    assert any("convolution" in n for n in names)
    return len(names) == 1
