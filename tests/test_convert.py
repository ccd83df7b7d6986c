"""convert: which idioms become one call, and that they compute what they did."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversions import assert_converts, images, patterns, prepared
from oracles import torchvision
from seeds import seed_all
from tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert
from fastcnn.convert.codegen import runtime
from fastcnn.convert.converted import Converted


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
    "bicubic": (lambda: net(lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bicubic")), []),
}  # fmt: skip


def _iadd(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


@pytest.mark.parametrize("name", CASES)
def test_idioms(name: str) -> None:
    make, expected = CASES[name]
    assert assert_converts(make(), images(3, 4, 6, 8)) == expected


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


@pytest.mark.parametrize("up", [None, nn.Upsample(scale_factor=2)])
@pytest.mark.parametrize("last", [False, True, None])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_chain_on_an_upsampled_image(up: Any, last: bool | None, layout: Any) -> None:
    x = images(2, 32, 5, 4).to(memory_format=layout)
    skip = images(2, 4, 10, 8, seed=3).to(memory_format=layout)
    first = "interpolate" if last is None else "interpolate-cat"
    found = assert_converts(Decoder(up, last), x, skip)
    assert found == [f"{first} > conv-bn-relu > conv-bn-relu"]


def test_a_skip_of_another_type_is_concatenated_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_said", set())  # what is said once, other tests may have heard
    # torch.cat promotes; the kernel for the small image takes one type.
    x = images(2, 32, 5, 4).to(memory_format=torch.channels_last)
    skip = images(2, 4, 10, 8).float().to(memory_format=torch.channels_last)
    model = prepared(Decoder(None, False)).eval()
    want = model(x, skip)
    with pytest.warns(UserWarning, match=r"its second input is torch\.float32 beside"):
        y = convert(model)(x, skip)
    assert_same(y, want)


def test_channels_last_keeps_the_layout() -> None:
    x = images(2, 4, 6, 8).to(memory_format=torch.channels_last)
    model = nn.Sequential(cbr(nn.ReLU()), cbr(nn.ReLU())).to(memory_format=torch.channels_last)
    assert_converts(model, x)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


def test_outputs_keep_their_types() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.relu(m.bn(m.conv(x)))
        return OrderedDict(out=y, aux=(m.bn2(m.conv2(y)), [y.mean(), None, 3]))

    model = net(run)
    assert_converts(model, images(2, 4, 5, 5))
    out = model(images(2, 4, 5, 5))
    assert type(out) is OrderedDict
    assert list(out) == ["out", "aux"]
    assert type(out["aux"]) is tuple
    assert out["aux"][1][1:] == [None, 3]


def test_two_inputs_and_a_default() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x: Tensor, skip: Tensor, scale: float = 2.0) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + skip) * scale

    model = Two()
    x, skip = images(2, 4, 5, 5), images(2, 4, 5, 5, seed=9)
    assert assert_converts(model, x, skip) == ["conv-bn + residual - relu"]
    y = model(x, skip)
    assert torch.equal(model(x, skip=skip), y)
    assert torch.equal(model(skip=skip, x=x), y)
    # Another value than the one that was traced runs the forward as it is written.
    assert_same(model(x, skip, scale=6.0), 3 * y)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model(x)


def test_dropout_of_every_kind_is_ours() -> None:
    model = net(
        lambda m, x: F.dropout2d(F.dropout(m.drop(x), 0.5, m.training), 0.3, m.training),
        drop=nn.Dropout(0.2),
    )
    prepared(model)
    convert(model)
    x = torch.ones(64, 16, 32, 32, dtype=torch.float64)
    assert patterns(model) == ["dropout", "dropout"]
    assert isinstance(model.drop, Converted)
    seed_all(3)
    y = model(x)
    # Channels that are all 0 were dropped whole; of 1024 elements none is left by 0.6^1024.
    channels = y.flatten(2)[(y != 0).any(3).any(2)]
    values = channels[channels != 0]
    # Within 6 deviations of the binomial distributions: outside by chance once in 5e8 draws.
    for count, n, p in ((len(channels), 64 * 16, 0.7), (len(values), channels.numel(), 0.8 * 0.5)):
        assert abs(count - n * p) < 6 * math.sqrt(n * p * (1 - p))
    assert_same(values, torch.full_like(values, 1 / (0.8 * 0.5 * 0.7)))
    model.eval()
    assert torch.equal(model(x), x)
