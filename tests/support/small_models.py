"""Small models, each with one op, and converted ones: what PyTorch offers must work with all alike.

Tensors come in twice where they may: an input that is the residual too, a step that runs twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from support.chains import stage
from support.conv2d_int8_cases import PLAIN, problem
from support.conversion_cases import cbr
from support.seeds import seed_all, seeded
from torch import Tensor, nn

from fastcnn import convert, models
from fastcnn.augment import Augment
from fastcnn.functional import conv2d_int8, pack_conv2d_int8
from fastcnn.nn import (
    BatchNormAct2d,
    DepthwiseConv2d,
    Dropout,
    Dropout2d,
    GroupNormAct,
    InstanceNormAct2d,
    LayerNorm2d,
    LinearAct,
    SqueezeExcite,
    Upsample,
    conv_bn_act,
)
from fastcnn.ops.upsample_conv2d.interface import upsample_conv2d


class Residual(nn.Module):
    """A batch norm that adds its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = BatchNormAct2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x, x)


class FixedStatistics(BatchNormAct2d):
    """A batch norm that never trains: what backward needs of it has an operator of its own."""

    def __init__(self) -> None:
        super().__init__(4, act="silu")

    def train(self, mode: bool = True) -> "FixedStatistics":
        return super().train(False)


class Concatenated(nn.Module):
    """Batch norms of several tensors, one of them twice, with a residual and without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BatchNormAct2d(11), BatchNormAct2d(15, act="silu")

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.first([x, other, x])
        return self.second((y, x), torch.cat([x, y], 1))


class AllNorms(nn.Module):
    """With trained and frozen statistics, around a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.bn = BatchNormAct2d(6, act="relu6")
        self.conv, self.conv_bn = nn.Conv2d(6, 6, 3, padding=1, bias=False), BatchNormAct2d(6)
        self.norms = nn.Sequential(
            GroupNormAct(2, 6, act="silu"),
            LayerNorm2d(6),
            InstanceNormAct2d(6, affine=True, track_running_stats=True, act="gelu"),
        )
        self.frozen = BatchNormAct2d(6, act="none")

    def train(self, mode: bool = True) -> "AllNorms":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.first(x))
        x = conv_bn_act(x, [(self.conv, self.conv_bn)] * 2, residual=x)
        x = self.norms(x)
        return self.frozen(x, x)


class Dropouts(nn.Module):
    """Two dropouts of the same tensor with the same arguments, which must not be made one; one of
    channels, one that gets a tensor twice, one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.one, self.channels, self.inplace = Dropout(0.3), Dropout2d(0.4), Dropout(0.2, True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.channels(self.one(x) - self.one(x), x)
        x = self.one(x, x)
        return self.inplace(x * 2)


class Decoder(nn.Module):
    """A block of a U-Net: up and concatenated, a convolution, up."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv = Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(5, 3, 3)
        self.last = Upsample(size=(9, 8))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.last(self.conv(self.up(x, skip)))


class ConvOfUpsampled(nn.Conv2d):
    """A convolution of an upsampled activation and a skip, in channels_last: by taps."""

    def __init__(self) -> None:
        super().__init__(35, 6, 3)  # 32 of them upsampled: with fewer it is not worth while

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x, skip = (t.contiguous(memory_format=torch.channels_last) for t in (x, skip))
        how = {"scale_factor": 2, "mode": "bilinear", "concat": skip}
        return upsample_conv2d(x, self.weight, self.bias, **how)


class Int8(nn.Module):
    """Two convolutions with a residual, one of them packed."""

    def __init__(self) -> None:
        super().__init__()
        given = problem(PLAIN)
        self.register_buffer("scale", given["weight_scale"])
        self.packed = pack_conv2d_int8(given["weight"])
        self.register_buffer("weight", given["weight"][:, :1].repeat(1, 24, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8":
        super()._apply(fn, recurse)
        self.packed = self.packed.to(self.scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = conv2d_int8(
            x, self.packed, x_scale=0.1, x_zero_point=3, weight_scale=self.scale, padding=1,
            act="relu", out_scale=0.3, out_zero_point=4,
        )  # fmt: skip
        return conv2d_int8(
            y, self.weight, x_scale=0.3, x_zero_point=4, weight_scale=0.01, padding=1, residual=y,
            residual_scale=0.3, residual_zero_point=4, out_dtype=torch.bfloat16,
        )  # fmt: skip


class AugmentWithMasks(nn.Module):
    """Images and masks, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.augment = Augment((5, 6), degrees=30, brightness=0.3, hue=0.1, noise=0.1, mean=0.5)

    def forward(self, images: Tensor) -> Tensor:
        y, masks = self.augment(images, images[:, 0].contiguous())
        return torch.cat([y, masks[:, None]], 1)


class Small(NamedTuple):
    """make() -> the model; sizes: of its inputs, without their first dimension.

    gradient: "once", or "twice" where it is differentiable itself, or "none".
    """

    make: Callable[[], nn.Module]
    sizes: tuple[tuple[int, ...], ...] = ((4, 9, 8),)
    gradient: str = "once"
    dtype: torch.dtype = torch.float32

    def inputs(self, n: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return n images of each size; floats, of this dtype, are leaves."""
        g = seeded(seed)
        if self.dtype is torch.uint8:
            return [torch.randint(256, (n, *s), generator=g).byte() for s in self.sizes]
        return [torch.randn(n, *s, generator=g).to(dtype).requires_grad_() for s in self.sizes]


def _converted(**options: Any) -> nn.Module:
    """A chain with a skip connection, an activation that stays PyTorch's, and a head."""
    return convert(
        nn.Sequential(
            cbr(nn.ReLU(), nn.MaxPool2d(2)),
            models.resnet.BasicBlock(4, 4),
            cbr(nn.Tanh()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        ),
        **options,
    )


def _bottlenecks(memory: str) -> nn.Module:
    return stage("projection", "identity", "two steps", memory=memory)


SMALL: dict[str, Small] = {
    "batch_norm_act": Small(lambda: BatchNormAct2d(4, act="relu6")),
    "batch_norm_act with a residual": Small(Residual),
    "batch_norm_act of several tensors": Small(Concatenated, ((4, 9, 8), (3, 9, 8))),
    "batch_norm_act, fixed statistics": Small(FixedStatistics),
    "group_norm_act": Small(lambda: GroupNormAct(2, 4, act="silu")),
    "LayerNorm2d": Small(lambda: LayerNorm2d(4)),
    "InstanceNormAct2d": Small(lambda: InstanceNormAct2d(4, track_running_stats=True)),
    "conv_bn_act": Small(partial(_bottlenecks, "default")),
    "conv_bn_act, low memory": Small(partial(_bottlenecks, "low")),
    "conv_bn_act, lowest memory": Small(partial(_bottlenecks, "lowest")),
    "depthwise_conv2d": Small(lambda: DepthwiseConv2d(4, 3, 2, 1, act="silu")),
    "linear_act": Small(lambda: LinearAct(8, 5, act="gelu"), gradient="twice"),
    "squeeze_excite": Small(lambda: SqueezeExcite(4, 3, act="silu")),
    "dropout": Small(Dropouts, gradient="twice"),
    "interpolate": Small(Decoder, ((2, 4, 4), (3, 8, 8))),
    "upsample_conv2d": Small(ConvOfUpsampled, ((32, 3, 4), (3, 6, 8))),
    "conv2d_int8": Small(Int8, (PLAIN.sizes[1:],), "none", torch.uint8),
    "augment": Small(
        AugmentWithMasks,
        ((3, 8, 9),),
        "none",
        torch.uint8,
    ),
    "all norms": Small(AllNorms),
    "converted": Small(_converted),
    "converted for inference": Small(partial(_converted, mode="infer")),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the same model each time, in training mode."""
    seed_all(0)
    model = SMALL[name].make().train()
    return model.to(dtype) if SMALL[name].dtype is torch.float32 else model


def results(
    run: Callable[..., Any], model: nn.Module, *batches: list[Tensor], gradient: bool = True
) -> dict[str, Tensor]:
    """Return outputs and gradients, of the inputs too, after the same seed; then the buffers."""
    seed_all(3)
    found = {}
    for i, inputs in enumerate(batches):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        y = run(*leaves)
        found[f"y {i}"] = y.detach()
        if gradient:
            mean_square(y).backward()
            found |= {f"dx {i}, {j}": t.grad for j, t in enumerate(leaves)}
    if gradient:
        found |= {f"d{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the bit, and of the same strides."""
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(found[name], t), name
        assert found[name].stride() == t.stride(), name


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()
