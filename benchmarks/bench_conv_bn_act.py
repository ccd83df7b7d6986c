"""conv_bn_act vs. PyTorch at its best, in bf16 and channels_last: single steps, and blocks.

    infer   act(batch_norm(conv2d(x)) + residual) in evaluation, over ResNet-50's and U-Net's
            convolutions; the residual where a bottleneck has one
    train   act(batch_norm(conv2d(x))) in training, forward and backward, over the same
    blocks  ResNet-50's, forward and backward, also in fp32

PyTorch runs each of them one by one ("eager"), compiled, and in evaluation with the batch norm
folded into the weights beforehand, which fastcnn does at every call; on a GPU also by cuDNN's own
convolution + bias + ReLU (+ residual) from the same folded weights ("cudnn"), and what is compiled
there is the folded one, by max-autotune. The floor of an inference in bytes is x, weight, residual
and y once; with a backward most of the time is the convolutions', and there is none to compare
with. On CUDA FASTCNN_PLAN=tune finds each step's plan before its times.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from candidates import compiled
from support.shapes import RESNET50_CONVS, UNET_CONVS, Conv
from torch import Tensor, nn
from where import ALL, DEVICE, HAS_GPU, cases, on, tiny, tiny_conv

from fastcnn import convert
from fastcnn.functional import conv_bn_act
from fastcnn.lab import eager_baseline
from fastcnn.models.resnet import Bottleneck
from fastcnn.ops.conv_bn_act.step import ConvBnActStep

BATCH = {"resnet50": on(16, 256), "unet": on(1, 16)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 4  # in turn: all but the smallest steps' are beyond the caches, as a block's activations
# Compiling all of them takes minutes. These stand for them: much to move beside little arithmetic,
# with a residual and without; much arithmetic; little of both. On a GPU two in inference.
COMPILED = on(
    {"64-256-k1-s1-56", "256-64-k1-s1-56", "64-64-k3-s1-256", "512-512-k3-s1-7"},
    {"64-256-k1-s1-56", "256-256-k3-s1-14"},
)
GPU_CASES = {
    "infer": [
        "resnet50-64-256-k1-s1-56",
        "resnet50-256-64-k1-s1-56",
        "resnet50-128-128-k3-s1-28",
        "resnet50-256-256-k3-s1-14",
        "resnet50-1024-256-k1-s1-14",
        "resnet50-512-2048-k1-s1-7",
        "unet-64-64-k3-s1-256",
    ],
    "train": [
        "resnet50-64-256-k1-s1-56",
        "resnet50-256-64-k1-s1-56",
        "resnet50-128-128-k3-s1-28",
        "resnet50-256-256-k3-s1-14",
        "resnet50-1024-256-k1-s1-14",
    ],
}
BLOCKS_ON_GPU = ["stage1-identity-bf16", "stage3-identity-bf16"]

Step = Callable[[Tensor, ConvBnActStep, Tensor | None], Tensor]


def convolutions(what: str) -> list[Any]:
    everything = {
        f"{what}-{network}-{conv}": (conv, BATCH[network])
        for network, convs in (("resnet50", RESNET50_CONVS), ("unet", UNET_CONVS))
        for conv in convs
    }
    return cases(everything, [f"{what}-{name}" for name in GPU_CASES[what]])


def image(n: int, c: int, side: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(n, c, side, side, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def step_of(conv: Conv, training: bool) -> ConvBnActStep:
    weight = torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel, device=DEVICE)
    weight = (weight * weight[0].numel() ** -0.5).bfloat16()
    mean, bias = torch.randn(2, conv.c_out, device=DEVICE)
    var, bn_weight = torch.rand(2, conv.c_out, device=DEVICE) + 0.5
    return ConvBnActStep(
        weight.contiguous(memory_format=torch.channels_last).requires_grad_(training),
        stride=conv.stride,
        padding=conv.kernel // 2,
        running_mean=mean,
        running_var=var,
        bn_weight=bn_weight.requires_grad_(training),
        bn_bias=bias.requires_grad_(training),
        training=training,
    )


def ours(x: Tensor, step: ConvBnActStep, residual: Tensor | None) -> Tensor:
    return conv_bn_act(x, [step], residual)


def eager(x: Tensor, step: ConvBnActStep, residual: Tensor | None) -> Tensor:
    y = F.conv2d(x, step.weight, None, step.stride, step.padding)
    norm = step.running_mean, step.running_var, step.bn_weight, step.bn_bias
    y = F.batch_norm(y, *norm, step.training, step.momentum, step.eps)
    if residual is not None:
        y += residual
    return F.relu_(y)


def folded_weights(step: ConvBnActStep) -> tuple[Tensor, Tensor]:
    scale = step.bn_weight * torch.rsqrt(step.running_var + step.eps)
    bias = (step.bn_bias - step.running_mean * scale).bfloat16()
    weight = (step.weight * scale[:, None, None, None]).bfloat16()
    return weight.contiguous(memory_format=torch.channels_last), bias


def folded(step: ConvBnActStep) -> Step:
    weight, bias = folded_weights(step)

    def run(x: Tensor, step: ConvBnActStep, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, weight, bias, step.stride, step.padding)
        return F.relu_(y if residual is None else y.add_(residual))

    return run


def cudnn(step: ConvBnActStep) -> Step:
    weight, bias = folded_weights(step)
    stride, padding = step.stride, step.padding
    geometry = (stride, stride), (padding, padding), (1, 1), 1

    def run(x: Tensor, step: ConvBnActStep, residual: Tensor | None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)

    return run


@pytest.mark.parametrize("case", convolutions("infer"))
def test_inference(compare: Any, warm: bool, case: tuple[Conv, int]) -> None:
    conv, (batch,) = tiny_conv(case[0]), tiny(case[1])
    step = step_of(conv, training=False)
    # A bottleneck's last convolution widens 4 times; what widens less stands in its shortcut.
    adds = conv.kernel == 1 and case[0].c_out == 4 * case[0].c_in
    side = (conv.side - 1) // conv.stride + 1
    inputs = [
        (image(batch, conv.c_in, conv.side), image(batch, conv.c_out, side) if adds else None)
        for _ in range(INPUTS)
    ]

    def on_inputs(run: Step) -> Callable[[tuple[Tensor, Tensor | None]], Tensor]:
        return lambda pair: run(pair[0], step, pair[1])

    with torch.inference_mode():
        baselines = {"eager": eager, "folded": folded(step)}
        if HAS_GPU:
            baselines["cudnn"] = cudnn(step)
        # Not to warm up: max-autotune times what it finds, and keeps the choice on disk.
        if not warm and (ALL or str(case[0]) in COMPILED):
            options = on({}, {"mode": "max-autotune-no-cudagraphs"})
            baselines["compiled"] = compiled(on(eager, folded(step)), **options)
        x, residual = inputs[0]
        y = ours(x, step, residual)  # tunes here
        moved = [t.numel() for t in (x, step.weight, residual, y) if t is not None]
        larger = max(x, y, key=Tensor.numel)
        compare(
            on_inputs(ours),
            {name: on_inputs(run) for name, run in baselines.items()},
            inputs,
            sum(moved) / larger.numel(),
            larger,
        )


@pytest.mark.parametrize("case", convolutions("train"))
def test_training(compare: Any, warm: bool, case: tuple[Conv, int]) -> None:
    conv, (batch,) = tiny_conv(case[0]), tiny(case[1])
    step = step_of(conv, training=True)
    inputs = [image(batch, conv.c_in, conv.side).requires_grad_() for _ in range(INPUTS)]
    dy = torch.randn_like(ours(inputs[0], step, None))

    def gradients(run: Step) -> Callable[[Tensor], tuple[Tensor, ...]]:
        parameters = step.weight, step.bn_weight, step.bn_bias
        return lambda x: torch.autograd.grad(run(x, step, None), [x, *parameters], dy)

    gradients(ours)(inputs[0])  # tunes here
    baselines = {"eager": eager}
    if not warm and (ALL or (not HAS_GPU and str(case[0]) in COMPILED)):
        options = on({}, {"mode": "max-autotune-no-cudagraphs"})
        baselines["compiled"] = compiled(eager, **options)
    beside = {name: gradients(run) for name, run in baselines.items()}
    compare(gradients(ours), beside, inputs, 0, dy)


class Stage(NamedTuple):
    """The blocks of a stage on 224x224 images: channels inside, and the side of their output."""

    planes: int
    side: int


STAGES = {f"stage{i}": Stage(32 * 2**i, 112 // 2**i) for i in (1, 2, 3, 4)}


def bottleneck(planes: int, projection: bool) -> Bottleneck:
    """The first block of a stage, with a projection, or one of the others."""
    if not projection:
        return convert(Bottleneck(4 * planes, planes))
    stride, c_in = (1, 64) if planes == 64 else (2, 2 * planes)
    shortcut = nn.Conv2d(c_in, 4 * planes, 1, stride, bias=False)
    beside = nn.Sequential(shortcut, nn.BatchNorm2d(4 * planes))
    return convert(Bottleneck(c_in, planes, stride, beside))


BLOCKS = {
    f"{stage}-{kind}-{dtype}": (stage, kind, DTYPES[dtype])
    for stage in STAGES
    for kind in ("projection", "identity")
    for dtype in DTYPES
}


@pytest.mark.parametrize("case", cases(BLOCKS, BLOCKS_ON_GPU))
def test_blocks(compare: Any, case: tuple[str, str, torch.dtype]) -> None:
    stage, kind, dtype = case
    planes, side = STAGES[stage]
    model = bottleneck(planes, kind == "projection").to(
        DEVICE, dtype, memory_format=torch.channels_last
    )
    plain = eager_baseline(model)
    batch, side = tiny(BATCH["resnet50"], side * model.conv2.stride[0])
    inputs = [
        image(batch, model.conv1.in_channels, side, dtype).requires_grad_() for _ in range(INPUTS)
    ]
    with torch.no_grad():
        dy = torch.randn_like(model(inputs[0]))

    def step(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x), [x, *model.parameters()], dy)

    compare(lambda x: step(model, x), lambda x: step(plain, x), inputs, 0, dy)
