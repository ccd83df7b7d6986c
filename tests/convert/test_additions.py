"""What PyTorch's addition takes behind a chain: fused, or run as it is."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.conversion_cases import Forward
from support.conversions import assert_converts, images, prepared
from support.tolerance import assert_same
from torch import Tensor, nn

from fastcnn import convert
from fastcnn.convert.codegen import fit

# What a projection gives where the other chain gives [2, 6, 8, 10].
PROJECTIONS = {
    "one channel": nn.Conv2d(4, 1, 1),
    "one row": nn.Conv2d(4, 6, (8, 1)),
    "one column": nn.Conv2d(4, 6, (1, 10)),
    "one pixel of one channel": nn.Conv2d(4, 1, (8, 10)),
    "the same": nn.Conv2d(4, 6, 1),
}


def _swapped(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.other_bn(m.other(x)) + m.bn(m.conv(x)))


def _ordered(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.bn(m.conv(x)) + m.other_bn(m.other(x)))


@pytest.mark.parametrize("run", [_ordered, _swapped])
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("memory", ["full", "default", "low"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_two_chains_of_one_input(name: str, memory: Any, mode: Any, run: Any) -> None:
    other = PROJECTIONS[name]
    model = Forward(
        run, conv=nn.Conv2d(4, 6, 3, padding=1), bn=nn.BatchNorm2d(6),
        other=other, other_bn=nn.BatchNorm2d(other.out_channels),
    )  # fmt: skip
    assert_converts(model, images(2, 4, 8, 10), memory=memory, mode=mode)
    assert any(m in fit.notes for m in model.modules()) == (name != "the same")


@pytest.mark.parametrize("memory", ["full", "low"])
def test_an_integer_for_both_sides(memory: Any) -> None:
    # As who dilates a backbone sets it: nn.Conv2d itself makes pairs.
    model = Forward(
        _ordered, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6),
        other=nn.Conv2d(4, 6, 1), other_bn=nn.BatchNorm2d(6),
    )  # fmt: skip
    model.conv.padding = model.conv.dilation = 2
    model.conv.stride = model.other.stride = 2
    assert_converts(model, images(2, 4, 8, 10), memory=memory)
    assert not any(m in fit.notes for m in model.modules())


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_integers_of_numpy(mode: Any) -> None:
    # As of channels and paddings that were computed: nn.Conv2d keeps them.
    one, two = np.int64(1), np.int64(2)
    model = Forward(
        _ordered, conv=nn.Conv2d(4, 6, 3, two, one, one, two), bn=nn.BatchNorm2d(6),
        other=nn.Conv2d(4, 6, 1, two), other_bn=nn.BatchNorm2d(6),
    )  # fmt: skip
    assert_converts(model, images(2, 4, 8, 10), mode=mode)


class _Identity(nn.Module):
    """A block whose input is broadcast, behind one that projects: memory="low" merges the two."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in ((4, 1), (4, 1), (1, 6)))
        self.bns = nn.ModuleList(nn.BatchNorm2d(o) for o in (1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (nn.Sequential(*pair) for pair in zip(self.convs, self.bns, strict=True))
        x = torch.relu(a(x) + b(x))
        return torch.relu(c(x) + x)


@pytest.mark.parametrize("memory", ["full", "default", "low"])
def test_an_input_that_is_broadcast(memory: Any) -> None:
    assert_converts(_Identity(), images(2, 4, 8, 10), memory=memory)


class _Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, other: Any) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + other)


ADDED: dict[str, Any] = {
    "float": 1.5, "int": 2, "bool": True, "0-dim": torch.tensor(2.0),
    "fewer dimensions": torch.ones(4, 1, 1), "one image": torch.ones(1, 4, 8, 8),
    "one channel": torch.ones(2, 1, 8, 8), "integers": torch.ones(2, 4, 8, 8, dtype=torch.int64),
    "float64": torch.ones(2, 4, 8, 8, dtype=torch.float64),
    "more dimensions": torch.ones(3, 2, 4, 8, 8), "not dense": torch.ones(2, 4, 8, 16)[..., ::2],
    "expanded": torch.ones(1, 1, 8, 8).expand(2, 4, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", ADDED)
def test_whatever_is_added(name: str, mode: Any, autocast: bool) -> None:
    # Under autocast in float32, to the bit: what it does not cast is left to PyTorch's addition.
    dtype = torch.float32 if autocast else torch.float64
    x = images(2, 3, 8, 8).to(dtype)
    for training in (True, False):
        model = prepared(_Adds()).to(dtype).train(training)
        found = []
        for m in (copy.deepcopy(model), convert(model, mode=mode)):
            with torch.autocast("cpu", torch.bfloat16, autocast):
                found.append(m(x, ADDED[name]))
        assert found[0].dtype is found[1].dtype
        if autocast:
            assert torch.equal(found[1], found[0])
        else:
            assert_same(found[1], found[0])
