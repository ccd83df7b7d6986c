"""Batch norms of concatenations: DenseNets of torchvision and timm, types, layouts and memory."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.conversion_cases import Forward, bn, conv, net
from support.conversions import assert_converts, assert_infers, images, patterns, prepared
from support.oracles import timm, torchvision
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastcnn import convert, report, verify
from fastcnn.convert.report import rows

NORM = "cat-batch_norm-relu"
SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 2), "num_classes": 5}
NETWORKS = {
    "torchvision": lambda **o: torchvision.models.DenseNet(**SMALL, num_init_features=8, **o),
    "timm": lambda **o: timm.models.densenet.DenseNet(**SMALL, **o),
}


def norms_of(model: nn.Module) -> int:
    return sum(row.pattern == NORM and row.fused for row in rows(model))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_densenet_concatenates_nothing(name: str) -> None:
    # Each layer's first norm, the transition's and the last one: all that torch.cat is there for.
    x = images(2, 3, 32, 36)
    model = NETWORKS[name]()
    assert_converts(model, x)
    assert norms_of(model) == 6
    with torch.profiler.profile() as profile:
        model(x)
    assert "aten::cat" not in {event.key for event in profile.key_averages()}
    assert verify(model, x) is not None
    assert any(row.pattern == NORM for row in report(model))
    assert_infers(NETWORKS[name](), x)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_densenet_that_recomputes(memory_efficient: bool) -> None:
    # It asks each tensor whether it requires a gradient: what does not trace runs as written.
    model = torchvision.models.DenseNet(**SMALL, memory_efficient=memory_efficient)
    assert_converts(model, images(2, 3, 32, 36))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_pieces_of_other_types_are_promoted(mode: Any, autocast: bool) -> None:
    # As torch.cat does it, with autocast and without.
    x = images(2, 4, 6, 5)
    model = prepared(net(lambda m, x: m.relu(m.big(torch.cat([x, x.float()], 1))), big=bn(8)))
    before = copy.deepcopy(model)
    convert(model, mode=mode)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16, autocast):
            found, expected = (m.train(training)(x) for m in (model, before))
        assert found.dtype is expected.dtype is torch.float64
        assert_same(found, expected)


def test_pieces_under_autocast() -> None:
    # All in bfloat16: the kernel reads them so, and gives their type.
    model = net(lambda m, x: m.big(torch.cat([m.conv(x), m.conv2(x)], 1)), big=bn(8))
    convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 4, 6, 5)).dtype is torch.bfloat16
    assert patterns(model) == ["cat-batch_norm"]


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(lambda x: [x, x[:, 1:3]], id="a slice of channels"),
        pytest.param(lambda x: [x, x.to(memory_format=torch.channels_last)], id="two layouts"),
        pytest.param(lambda x: [x, x.mT.contiguous().mT], id="transposed"),
        pytest.param(lambda x: [x, x[:, :1].expand(x.shape)], id="expanded"),
        pytest.param(lambda x: [x, x.new_empty(0)], id="what torch.cat leaves out"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_only_torch_concatenates(pieces: Any, layout: str) -> None:
    x = images(2, 4, 6, 5).contiguous(memory_format=LAYOUTS[layout])
    c = torch.cat(pieces(x), 1).shape[1]
    model = Forward(lambda m, x: F.silu(m.bn(torch.cat(pieces(x), 1))), bn=bn(c))
    before = copy.deepcopy(model.double())
    convert(model)
    for training in (True, False):
        found, expected = (m.train(training)(x) for m in (model, before))
        assert_same(found, expected)
        assert found.stride() == expected.stride()


def test_wrong_channels_are_named() -> None:
    model = convert(net(lambda m, x: m.bn(torch.cat([x, m.conv(x)], 1))))
    with pytest.raises((ValueError, RuntimeError), match=r"bn: .*expected 8 numbers|8 channels"):
        model(torch.randn(2, 4, 6, 5))


def test_a_densenet_keeps_less_for_backward() -> None:
    # A layer's own output once, and not in the concatenation of each layer behind it.
    def saved(model: nn.Module, x: Tensor) -> int:
        sizes: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            held.append(t)
            return t

        held: list[Tensor] = []
        with saved_tensors_hooks(keep, lambda t: t):
            model(x)
        return sum(sizes.values())

    x = torch.randn(2, 3, 64, 64)
    model = torchvision.models.DenseNet(8, (6, 6), 16, num_classes=5)
    # Channels that are concatenated, and those of the pieces, of 2 x 16 x 16 and 2 x 8 x 8 floats:
    # by the layers 16, 24 .. 56 and 32, 40 .. 72, behind them 64 and 80.
    concatenated, pieces = 280 * 2048 + 392 * 512, 64 * 2048 + 80 * 512
    before = saved(model, x)
    assert saved(convert(model), x) <= before - (concatenated - pieces)


@pytest.mark.parametrize("first", ["norm", "cat"])
def test_a_residual_that_a_norm_around_it_still_reads(first: str) -> None:
    # For inference a chain may write into a residual that nobody reads behind it; a fused norm that
    # begins before the addition reads at its end.
    def run(m: Any, x: Tensor) -> Tensor:
        a = m.relu(m.bn(m.conv(x)))
        y = m.last(a) if first == "norm" else m.big(torch.cat([a, x], 1))
        z = m.bn2(m.conv2(x)) + a
        return torch.relu(y).mean((1, 2, 3), keepdim=True) + z

    more = {"last": bn()} if first == "norm" else {"big": bn(8)}
    assert_infers(net(run, **more), images(2, 4, 6, 8))


def test_convolutions_read_a_concatenation_as_before() -> None:
    model = net(lambda m, x: m.bn(m.wide(torch.cat([x, m.conv2(x)], 1))), wide=conv(8))
    assert assert_converts(model, images(2, 4, 6, 5)) == ["conv-bn"]
