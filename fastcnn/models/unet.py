"""U-Net (Ronneberger et al. 2015, arXiv 1505.04597), padded, so that logits have x's size."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.init import initialise
from fastcnn.models.network import Network
from fastcnn.models.registry import register

__all__ = ["UNet", "unet"]

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}
_ACTS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
}
_UPS = ("bilinear", "nearest", "transposed")


class UNet(Network):
    """Halve `depth` times, double `depth` times, with what each halving lost set beside.

    x (n, in_chans, h, w) -> logits (n, num_classes, h, w)

        d_0     = convs(x)                              (n, width, h, w)
        d_i     = convs(maxpool(d_{i-1}))               (n, 2^i width, h_i, w_i)
        u_depth = d_depth
        u_i     = convs(cat(d_i, up(u_{i+1})))          (n, 2^i width, h_i, w_i)
        logits  = conv1x1(u_0)

    convs is twice [conv 3x3, norm, act], dropout by channels between the two. Any size from 2^depth
    on: pooling drops an odd row or column, h_i = floor(h_{i-1} / 2), and up brings u_{i+1} to
    exactly (h_i, w_i). `up` is "bilinear", "nearest", or "transposed": a convolution with stride 2
    that halves the channels. Without `skip` u_i = convs(up(u_{i+1})). `norm` is "batch", "group"
    (32 groups, or as many as divide the channels and 32) or "instance" (with gamma and beta);
    `act` is "relu", "leaky_relu", "silu" or "gelu".

    Raises:
        ValueError: depth or width below 1, an unknown norm, up or act.
    """

    heads = ("head",)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        depth: int = 4,
        width: int = 64,
        norm: str = "batch",
        up: str = "bilinear",
        skip: bool = True,
        dropout: float = 0.0,
        act: str = "relu",
    ) -> None:
        super().__init__()
        for name, number in (("depth", depth), ("width", width)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        _check_choice("norm", norm, _NORMS)
        _check_choice("up", up, _UPS)
        _check_choice("act", act, _ACTS)
        channels = [width * 2**i for i in range(depth + 1)]
        options = (norm, act, dropout)
        self.stem = _convs(in_chans, width, *options)
        self.pool = nn.MaxPool2d(2)
        self.downs = nn.ModuleList(
            _convs(c_in, c_out, *options) for c_in, c_out in pairwise(channels)
        )
        self.ups = nn.ModuleList(
            Up(c_in, c_out, up, skip, options) for c_in, c_out in pairwise(reversed(channels))
        )
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)
        initialise(self, "kaiming")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = [x]
        for down in self.downs:
            x = down(self.pool(x))
            skips.append(x)
        skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        logits: Tensor = self.head(x)
        return logits


class Up(nn.Module):
    """y = convs(cat(beside, up(x))): x (n, c_in, .., ..), beside (n, c_out, h, w) -> y as beside.

    Without `skip` only the size of `beside` is used.
    """

    def __init__(
        self, c_in: int, c_out: int, up: str, skip: bool, options: tuple[str, str, float]
    ) -> None:
        super().__init__()
        self.mode, self.skip = up, skip
        if up == "transposed":
            self.transposed = nn.ConvTranspose2d(c_in, c_out, kernel_size=2, stride=2)
            c_in = c_out
        self.convs = _convs(c_in + c_out if skip else c_in, c_out, *options)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        size = beside.shape[-2:]
        if self.mode == "transposed":
            x = self.transposed(x, output_size=size)
        else:
            x = F.interpolate(x, size=size, mode=self.mode)
        if self.skip:
            x = torch.cat([beside, x], 1)
        return cast(Tensor, self.convs(x))


def _convs(c_in: int, c_out: int, norm: str, act: str, dropout: float) -> nn.Sequential:
    first = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), _NORMS[norm](c_out), _ACTS[act]()
    second = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), _NORMS[norm](c_out), _ACTS[act]()
    between = [nn.Dropout2d(dropout)] if dropout else []
    return nn.Sequential(*first, *between, *second)


def _check_choice(name: str, value: str, choices: Sequence[str] | dict[str, Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


@register
def unet(**options: Any) -> UNet:
    """U-Net, 31.4M parameters; `options` are UNet's arguments, weights= and init=."""
    return UNet(**options)
