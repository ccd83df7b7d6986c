"""Small models, each with one idiom that convert knows, and what it makes one call of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from support.oracles import torchvision
from torch import Tensor, nn


class Forward(nn.Module):
    """Layers a, b, ... and a forward that a test writes."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(c_in: int = 4, c_out: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def bn(c: int = 4, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(c, **options)


def net(run: Callable[..., Any], **more: nn.Module) -> Forward:
    return Forward(run, conv=conv(), bn=bn(), conv2=conv(), bn2=bn(), relu=nn.ReLU(), **more)


def cbr(*options: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(), bn(), *options)


# A model, and what is one call of it.
CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    # The activation: as a module, in place, functions, methods, and none.
    "sequential": (lambda: cbr(nn.ReLU()), ["conv-bn-relu"]),
    "in place": (lambda: cbr(nn.ReLU(inplace=True)), ["conv-bn-relu"]),
    "no activation": (lambda: cbr(), ["conv-bn"]),
    "relu6": (lambda: cbr(nn.ReLU6()), ["conv-bn-relu6"]),
    "leaky": (lambda: cbr(nn.LeakyReLU()), ["conv-bn-leaky_relu"]),
    "silu": (lambda: cbr(nn.SiLU()), ["conv-bn-silu"]),
    "gelu": (lambda: cbr(nn.GELU()), ["conv-bn-gelu"]),
    "sigmoid": (lambda: cbr(nn.Sigmoid()), ["conv-bn-sigmoid"]),
    "hardswish": (lambda: cbr(nn.Hardswish()), ["conv-bn-hardswish"]),
    "F.relu": (lambda: net(lambda m, x: F.relu(m.bn(m.conv(x)))), ["conv-bn-relu"]),
    "F.relu in place": (
        lambda: net(lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True)), ["conv-bn-relu"],
    ),
    "F.relu by position": (
        lambda: net(lambda m, x: F.relu(m.bn(m.conv(x)), True)), ["conv-bn-relu"],
    ),
    "method": (lambda: net(lambda m, x: m.bn(m.conv(x)).relu_()), ["conv-bn-relu"]),
    # Other functions than the kernels have: the activation stays PyTorch's.
    "another slope": (lambda: cbr(nn.LeakyReLU(0.2)), ["conv-bn"]),
    "tanh gelu": (lambda: cbr(nn.GELU(approximate="tanh")), ["conv-bn"]),
    "another slope in F": (
        lambda: net(lambda m, x: F.leaky_relu(m.bn(m.conv(x)), 0.2)), ["conv-bn"],
    ),
    # Identities between are nothing.
    "identity": (lambda: nn.Sequential(conv(), nn.Identity(), bn(), nn.ReLU()), ["conv-bn-relu"]),
    "pool": (lambda: cbr(nn.ReLU(), nn.MaxPool2d(2)), ["conv-bn-relu-pool"]),
    "pool with indices": (
        lambda: net(
            lambda m, x: m.pool(m.relu(m.bn(m.conv(x))))[0],
            pool=nn.MaxPool2d(2, return_indices=True),
        ),
        ["conv-bn-relu"],
    ),
    "depthwise, strided": (
        lambda: nn.Sequential(conv(groups=4, stride=2, bias=False), bn(), nn.ReLU()),
        ["conv-bn-relu"],
    ),
    # Depthwise ones that are in no chain.
    "depthwise": (lambda: nn.Sequential(conv(groups=4), nn.Tanh()), ["depthwise_conv2d"]),
    "depthwise and an activation": (
        lambda: nn.Sequential(conv(groups=4, stride=2), nn.GELU(), bn()),
        ["depthwise_conv2d-gelu", "batch_norm"],
    ),
    "depthwise with two readers": (
        lambda: Forward(lambda m, x: (y := m.conv(x)) * m.bn(y), conv=conv(groups=4), bn=bn()),
        ["depthwise_conv2d", "batch_norm"],
    ),
    "depthwise with a multiplier": (
        lambda: nn.Sequential(conv(4, 8, groups=4), nn.Tanh(), bn(8)), ["batch_norm"],
    ),
    "depthwise with the same sides": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, (5, 3), padding="same", dilation=(1, 2), groups=4)),
        ["depthwise_conv2d"],
    ),
    "the same sides": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, (3, 5), padding="same"), bn()), ["conv-bn"],
    ),
    "valid": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding="valid"), bn()), ["conv-bn"]),
    # Chains, through containers.
    "chain": (lambda: nn.Sequential(cbr(nn.ReLU()), cbr()), ["conv-bn-relu > conv-bn"]),
    "chain with pool": (
        lambda: nn.Sequential(cbr(nn.ReLU(), nn.MaxPool2d(2)), cbr(nn.ReLU())),
        ["conv-bn-relu-pool > conv-bn-relu"],
    ),
    "two uses end a chain": (
        lambda: net(lambda m, x: (y := m.relu(m.bn(m.conv(x)))) + m.bn2(m.conv2(y))),
        ["conv-bn-relu", "conv-bn + identity"],
    ),
    # Additions: either order, every spelling, from anywhere.
    "x + f": (lambda: net(lambda m, x: m.relu(x + m.bn(m.conv(x)))), ["conv-bn + identity - relu"]),
    "f + x": (lambda: net(lambda m, x: m.relu(m.bn(m.conv(x)) + x)), ["conv-bn + identity - relu"]),
    "torch.add": (
        lambda: net(lambda m, x: F.relu(torch.add(x, m.bn(m.conv(x))))),
        ["conv-bn + identity - relu"],
    ),
    "add_": (
        lambda: net(lambda m, x: m.bn(m.conv(x)).add_(x).relu_()), ["conv-bn + identity - relu"],
    ),
    "+=": (lambda: net(lambda m, x: _iadd(m.bn(m.conv(x)), x)), ["conv-bn + identity"]),
    "weighted": (
        lambda: net(lambda m, x: torch.add(x, m.bn(m.conv(x)), alpha=2)), ["conv-bn"],
    ),
    "number": (lambda: net(lambda m, x: m.bn(m.conv(x)) + 1), ["conv-bn"]),
    "elsewhere": (
        lambda: net(lambda m, x: m.relu(torch.tanh(x) + m.bn(m.conv(x)))),
        ["conv-bn + residual - relu"],
    ),
    "broadcast": (  # other sizes than the kernel adds: one by one at the call, the same numbers
        lambda: net(lambda m, x: m.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True))),
        ["conv-bn + residual - relu"],
    ),
    "projection": (
        lambda: net(lambda m, x: m.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x)))),
        ["conv-bn + projection - relu"],
    ),
    "another input": (
        lambda: net(lambda m, x: m.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x.tanh())))),
        ["conv-bn", "conv-bn + residual - relu"],
    ),
    "itself": (lambda: net(lambda m, x: (y := m.bn(m.conv(x))) + y), ["conv-bn"]),
    # Norms.
    "pre-activation": (
        lambda: net(lambda m, x: x + m.conv(m.relu(m.bn(x)))), ["batch_norm-relu"],
    ),
    "batch norm and add": (
        lambda: net(lambda m, x: m.relu(m.bn(x) + torch.tanh(x))), ["batch_norm + residual-relu"],
    ),
    "group norm": (
        lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4), nn.SiLU()), ["group_norm-silu"],
    ),
    "instance norm": (
        lambda: nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
        ["instance_norm-relu"],
    ),
    "instance norm with statistics": (
        lambda: nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()),
        ["instance_norm-relu"],
    ),
    "layer norm 2d": (
        lambda: nn.Sequential(torchvision.models.convnext.LayerNorm2d(4), nn.GELU()),
        ["layer_norm_2d-gelu"],
    ),
    "frozen batch norm": (
        lambda: nn.Sequential(conv(), torchvision.ops.FrozenBatchNorm2d(4), nn.ReLU()),
        ["conv-bn-relu"],
    ),
    # Concatenations that a batch norm alone reads.
    "concatenated": (
        lambda: net(lambda m, x: m.relu(m.big(torch.cat([x, m.conv(x)], 1))), big=bn(8)),
        ["cat-batch_norm-relu"],
    ),
    "concatenated, twice the same": (
        lambda: net(
            lambda m, x: m.big(torch.concat((y := m.conv(x), x, y), dim=-3)), big=bn(12)
        ),
        ["cat-batch_norm"],
    ),
    "one tensor concatenated": (
        lambda: net(lambda m, x: F.relu(m.bn(torch.cat([x], 1)))), ["cat-batch_norm-relu"],
    ),
    "concatenated and added": (
        lambda: net(
            lambda m, x: m.relu(m.big(torch.cat([x, m.conv(x)], 1)) + torch.cat([x, x], 1)),
            big=bn(8),
        ),
        ["cat-batch_norm + residual-relu"],
    ),
    "concatenated, of half the channels": (  # one whole image is broadcast
        lambda: net(
            lambda m, x: m.relu(m.big(torch.cat([x, m.conv(x)], 1)) + x[:, :1]), big=bn(8),
        ),
        ["cat-batch_norm + residual-relu"],
    ),
    "concatenated for two": (
        lambda: net(lambda m, x: m.big(y := torch.cat([x, m.conv(x)], 1)) + y, big=bn(8)),
        ["batch_norm + residual"],
    ),
    "concatenated along rows": (
        lambda: net(lambda m, x: m.bn(torch.cat([x, m.conv(x)], 2))), ["batch_norm"],
    ),
    "concatenated, then a piece is overwritten": (
        # Backward would read what is no longer there.
        lambda: net(
            lambda m, x: m.big(torch.cat([x, y := m.conv(x)], 1)).mean() + y.tanh_(), big=bn(8)
        ),
        ["batch_norm"],
    ),
    # Resizing.
    "interpolate": (
        lambda: net(lambda m, x: F.interpolate(x, scale_factor=2.0)), ["interpolate"],
    ),
    "interpolate to a skip": (
        lambda: net(
            lambda m, x: torch.cat(
                [x, F.interpolate(F.max_pool2d(m.conv(x), 2), x.shape[2:], mode="bilinear")], 1
            )
        ),
        ["interpolate-cat"],
    ),
    "interpolate before a skip": (
        lambda: net(
            lambda m, x: torch.cat((m.up(F.max_pool2d(x, 2)), x), 1), up=nn.Upsample(None, 2)
        ),
        ["interpolate-cat"],
    ),
    "more than a skip": (
        lambda: net(lambda m, x: torch.cat([x, F.interpolate(x, scale_factor=1.0), x], 1)),
        ["interpolate"],
    ),
    "another dimension": (
        lambda: net(lambda m, x: torch.cat([x, F.interpolate(x, scale_factor=1.0)], 2)),
        ["interpolate"],
    ),
    "upsample to a skip": (
        lambda: net(
            lambda m, x: torch.cat([x, m.up(F.max_pool2d(x, 2))], dim=1),
            up=nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        ),
        ["interpolate-cat"],
    ),
    "bicubic": (
        lambda: net(lambda m, x: F.interpolate(m.bn(m.conv(x)), scale_factor=2.0, mode="bicubic")),
        ["conv-bn"],
    ),
}  # fmt: skip


class Decoder(nn.Module):
    """A U-Net's step up: resized, beside a skip, two convolutions; 32 channels, so by the image."""

    def __init__(self, up: Any, last: bool) -> None:
        super().__init__()
        self.up, self.last = up, last
        skips = 0 if last is None else 4
        self.first, self.bn = nn.Conv2d(32 + skips, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.body = cbr(nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if isinstance(self.up, nn.Module):
            y = self.up(x)
        else:
            y = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)
        if self.last is not None:
            y = torch.cat([y, skip] if self.last else [skip, y], 1)
        return self.body(F.relu(self.bn(self.first(y))))


class Branch(nn.Module):
    """Does not trace."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        for layer in self.children():
            x = layer(x) if x.sum() < 1e9 else x
        return x


def _iadd(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y
