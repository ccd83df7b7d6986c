"""Inference of whole networks in bf16, channels_last, and a U-Net's training step beside it.

ResNet-50 (batch 16, 224x224) and a U-Net (64 channels, 4 levels, bilinear; batch 4, 256x256), wired
by hand from FoldedConv2d and upsample_conv2d, beside eager, torch.compile (with freezing where
there is no gradient) and OpenVINO with the latency hint: on two cores its throughput hint gave the
same images a second, within 1 %.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.nn import BatchNormAct2d, conv_bn_act
from fastcnn.ops.conv2d_folded import FoldedConv2d
from fastcnn.ops.upsample_conv2d import upsample_conv2d
from fastcnn.ops.upsample_conv2d_folded import FoldedUpsampleConv2d

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
UP: dict[str, Any] = {"scale_factor": 2, "mode": "bilinear"}
Run = Callable[[Tensor], Tensor]


class _ConvBn(nn.Module):
    """A convolution and its batch norm, eager, folded, or through fastcnn in training."""

    def __init__(self, c_in: int, c_out: int, k: int = 3, stride: int = 1, act: str = "relu"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False)
        self.bn = BatchNormAct2d(c_out, act=act)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = nn.BatchNorm2d.forward(self.bn, self.conv(x))
        y = y if residual is None else y + residual
        return F.relu_(y) if self.bn.act == "relu" else y

    def folded(self, kind: Any = FoldedConv2d) -> Any:
        return kind(self.conv, self.bn, self.bn.act)


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            [_ConvBn(c_in, c, 1), _ConvBn(c, c, 3, stride), _ConvBn(c, 4 * c, 1)]
        )
        same = stride == 1 and c_in == 4 * c
        self.shortcut = None if same else _ConvBn(c_in, 4 * c, 1, stride, "none")

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.steps
        return c(b(a(x)), x if self.shortcut is None else self.shortcut(x))

    def folded(self) -> Run:
        a, b, c = (step.folded() for step in self.steps)
        shortcut = (lambda x: x) if self.shortcut is None else self.shortcut.folded()
        return lambda x: c(b(a(x)), shortcut(x), residual_dies=True)


class _ResNet50(nn.Module):
    size = (16, 3, 224, 224)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = _ConvBn(3, 64, 7, 2), nn.Linear(2048, 1000)
        blocks, c_in = [], 64
        for stage, count in enumerate((3, 4, 6, 3)):
            for i in range(count):
                blocks.append(_Bottleneck(c_in, 64 << stage, 2 if i == 0 and stage > 0 else 1))
                c_in = 256 << stage
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.ends(x, self.stem, self.blocks)

    def ends(self, x: Tensor, stem: Run, blocks: Run) -> Tensor:
        x = blocks(F.max_pool2d(stem(x), 3, 2, 1))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    def folded(self) -> Run:
        stem, blocks = self.stem.folded(), [block.folded() for block in self.blocks]

        def run(x: Tensor) -> Tensor:
            for block in blocks:
                x = block(x)
            return x

        return lambda x: self.ends(x, stem, run)


class _UNet(nn.Module):
    size = (4, 3, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        c = [64 << level for level in range(5)]
        self.down = nn.ModuleList(
            [
                nn.ModuleList([_ConvBn(a, b), _ConvBn(b, b)])
                for a, b in zip([3, *c], c, strict=False)
            ]
        )
        self.up = nn.ModuleList(
            [
                nn.ModuleList([_ConvBn(c[i] + c[i + 1], c[i]), _ConvBn(c[i], c[i])])
                for i in (3, 2, 1, 0)
            ]
        )
        self.head = nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        def up(pair: Any, x: Tensor, skip: Tensor) -> Tensor:
            return pair[1](pair[0](torch.cat([skip, F.interpolate(x, **UP)], 1)))

        return self.levels(x, lambda pair, x: pair[1](pair[0](x)), up)

    def levels(self, x: Tensor, down: Any, up: Any) -> Tensor:
        skips: list[Tensor] = []
        for i, pair in enumerate(self.down):
            x = down(pair, x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for pair in self.up:
            x = up(pair, x, skips.pop())
        return self.head(x)

    def folded(self) -> Run:
        kept = {id(step): step.folded() for pair in self.down for step in pair}
        for first, second in self.up:
            kept[id(first)] = first.folded(FoldedUpsampleConv2d)
            kept[id(second)] = second.folded()

        def down(pair: Any, x: Tensor) -> Tensor:
            return kept[id(pair[1])](kept[id(pair[0])](x))

        def up(pair: Any, x: Tensor, skip: Tensor) -> Tensor:
            return kept[id(pair[1])](kept[id(pair[0])](x, skip, **UP))

        return lambda x: self.levels(x, down, up)

    def trained(self) -> Run:
        def down(pair: Any, x: Tensor) -> Tensor:
            return conv_bn_act(x, [(step.conv, step.bn) for step in pair])

        def up(pair: Any, x: Tensor, skip: Tensor) -> Tensor:
            first, second = pair
            x = first.bn(upsample_conv2d(x, first.conv.weight, concat=skip, **UP))
            return conv_bn_act(x, [(second.conv, second.bn)])

        return lambda x: self.levels(x, down, up)


def openvino(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One synchronous call on all cores."""
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install .[bench]")
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    found = ov.convert_model(plain, example_input=x.contiguous(), input=list(x.shape))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
    compiled = ov.Core().compile_model(found, "CPU", options)
    request, image = compiled.create_infer_request(), x.contiguous().numpy()
    return lambda: request.infer({0: image}, share_inputs=True, share_outputs=True)


@pytest.mark.parametrize("kind", [_ResNet50, _UNet])
def test_inference(compare: Any, kind: Any) -> None:
    torch.manual_seed(0)
    model = kind().eval().to(memory_format=torch.channels_last)
    x = torch.randn(model.size).to(memory_format=torch.channels_last)
    half = copy.deepcopy(model).bfloat16()
    compiled = torch.compile(copy.deepcopy(half), options={"freezing": True})
    folded, latency = half.folded(), openvino(model, x)

    def run(call: Run) -> Callable[[Any], object]:
        def call_it(_: Any) -> object:
            with torch.no_grad():
                return call(x.bfloat16())

        return call_it

    others = {"eager": run(half), "compiled": run(compiled), "OpenVINO": lambda _: latency()}
    compare(run(folded), others, [None], 0, x)


def test_unet_training(compare: Any) -> None:
    torch.manual_seed(0)
    model = _UNet().to(memory_format=torch.channels_last)
    x = torch.randn(model.size).to(memory_format=torch.channels_last)
    labels = torch.randint(2, (x.shape[0], *x.shape[2:]))

    def step(call: Run) -> Callable[[Any], object]:
        def call_it(_: Any) -> object:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = call(x)
            return F.cross_entropy(y.float(), labels).backward()

        return call_it

    others = {"eager": step(model), "compiled": step(torch.compile(model))}
    compare(step(model.trained()), others, [None], 0, x)
