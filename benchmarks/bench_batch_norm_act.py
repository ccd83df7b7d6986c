"""batch_norm_act, forward and backward in training, beside F.batch_norm + add + relu.

Floor in passes over the tensor (docs/performance.md): forward 3, backward 5, and one more each for
a residual. Of a concatenation the same, where torch.cat has 2 more forward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from candidates import beside
from support.shapes import LAYOUTS, RESNET50
from torch import Tensor
from where import DEVICE, cases, on, tiny

from fastcnn.functional import batch_norm_act

# ResNet-50's first and last stage at batch 16: beyond the last-level cache, and within it. A GPU's
# L2 of 60 MB takes batch 256 and the stages down to the third: 103 to 411 MB in bf16.
BATCH = on(16, 256)
SHAPES = {
    f"{image.c}x{image.h}x{image.w}": image
    for image in on(
        (RESNET50[0], RESNET50[2], RESNET50[7]), (RESNET50[0], RESNET50[2], RESNET50[6])
    )
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # sets of tensors in turn: 4 x 51 MB and more, beyond any cache
CASES = {
    f"{shape}-{dtype}-{layout}-{kind}": (shape, dtype, LAYOUTS[name], kind == "residual")
    for shape in SHAPES
    for dtype in DTYPES
    for layout, name in (("nchw", "nchw"), ("nhwc", "channels_last"))
    for kind in ("", "residual")
}
GPU_CASES = [
    "256x56x56-bf16-nhwc-",
    "256x56x56-bf16-nhwc-residual",
    "256x56x56-bf16-nchw-",
    "256x56x56-fp32-nhwc-",
    "64x112x112-bf16-nhwc-",
    "1024x14x14-bf16-nhwc-residual",
]


# DenseNet-121's last layer in each of its first three blocks: channels before the block, and the
# layers in it before this one, of 32 each.
CONCATS = {
    f"{before}+{layers}x32x{side}x{side}-{dtype}{kind}": (before, layers, side, dtype, kind == "")
    for before, layers, side in ((64, 5, 56), (128, 11, 28), (256, 23, 14))
    for dtype in DTYPES
    for kind in ("", "-inference")
}


class Layer(NamedTuple):
    """What one call works on."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def layer(shape: str, dtype: str, layout: torch.memory_format, residual: bool) -> Layer:
    n, c, h, w = tiny(BATCH, *SHAPES[shape].sizes[1:])

    def image() -> Tensor:
        x = torch.randn(n, c, h, w, device=DEVICE).to(DTYPES[dtype], memory_format=layout)
        return x.requires_grad_()

    ones, zeros = (functools.partial(make, c, device=DEVICE) for make in (torch.ones, torch.zeros))
    return Layer(
        image(), image() if residual else None, image().detach(),
        ones(requires_grad=True), zeros(requires_grad=True), zeros(), ones(),
    )  # fmt: skip


def ours(layer: Layer) -> Tensor:
    return batch_norm_act(
        layer.x, layer.running_mean, layer.running_var, layer.weight, layer.bias,
        training=True, residual=layer.residual, act="relu",
    )  # fmt: skip


def eager(layer: Layer) -> Tensor:
    y = F.batch_norm(
        layer.x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=True
    )
    if layer.residual is not None:
        y += layer.residual
    return F.relu_(y)


def gradients(forward: Callable[[Layer], Tensor]) -> Callable[[Layer], tuple[Tensor, ...]]:
    def run(layer: Layer) -> tuple[Tensor, ...]:
        inputs = [t for t in (layer.x, layer.residual, layer.weight, layer.bias) if t is not None]
        return torch.autograd.grad(forward(layer), inputs, layer.dy)

    return run


@pytest.mark.parametrize("case", cases(CASES, GPU_CASES))
def test_training(compare: Any, case: tuple[str, str, torch.memory_format, bool]) -> None:
    layers = [layer(*case) for _ in range(INPUTS)]
    others = {name: gradients(forward) for name, forward in beside(eager).items()}
    compare(gradients(ours), others, layers, 10 if case[-1] else 8, layers[0].dy)


class Concat(NamedTuple):
    """Tensors whose concatenation is normalised."""

    xs: list[Tensor]
    weight: Tensor
    bias: Tensor
    stats: tuple[Tensor, Tensor]
    dy: Tensor


def concat(before: int, layers: int, side: int, dtype: str, training: bool) -> Concat:
    sizes = [tiny(on(8, 128), c, side, side) for c in (before, *[32] * layers)]

    def image(n: int, c: int, h: int, w: int) -> Tensor:
        x = torch.randn(n, c, h, w, device=DEVICE).to(DTYPES[dtype])
        return x.contiguous(memory_format=torch.channels_last)

    c = sum(size[1] for size in sizes)
    n, _, h, w = sizes[0]
    ones, zeros = (functools.partial(make, c, device=DEVICE) for make in (torch.ones, torch.zeros))
    weight, bias = ones(requires_grad=training), zeros(requires_grad=training)
    xs = [image(*size).requires_grad_(training) for size in sizes]
    return Concat(xs, weight, bias, (zeros(), ones()), image(n, c, h, w))


def ours_of_pieces(given: Concat) -> Tensor:
    training = given.weight.requires_grad
    return batch_norm_act(given.xs, *given.stats, given.weight, given.bias, training=training)


def eager_of_pieces(given: Concat) -> Tensor:
    training = given.weight.requires_grad
    x = torch.cat(given.xs, 1)
    return F.relu_(F.batch_norm(x, *given.stats, given.weight, given.bias, training=training))


def with_gradients(forward: Callable[[Concat], Tensor]) -> Callable[[Concat], object]:
    def run(given: Concat) -> object:
        y = forward(given)
        leaves = [*given.xs, given.weight, given.bias]
        return torch.autograd.grad(y, leaves, given.dy) if y.requires_grad else y

    return run


@pytest.mark.parametrize("case", cases(CONCATS, list(CONCATS)[:4]))
def test_concatenations(compare: Any, case: tuple[int, int, int, str, bool]) -> None:
    given = [concat(*case) for _ in range(INPUTS)]
    others = {name: with_gradients(forward) for name, forward in beside(eager_of_pieces).items()}
    ours = with_gradients(ours_of_pieces)
    compare(ours, others, given, 8 if case[-1] else 2, given[0].dy)
