"""Values whose squares or sums are beyond float32: finite where PyTorch is."""

from collections.abc import Callable

import pytest
import torch
from support.seeds import seeded
from support.shapes import LAYOUTS
from torch import Tensor, nn

from fastcnn import convert
from fastcnn.nn import LayerNorm2d

# One chunk and several, few and many channels, in one task and in parts: csrc/cpu/moments.h.
SIZES = [(4, 8, 16, 16), (2, 4, 96, 101), (3, 32, 5, 7), (67, 4, 3, 3), (2, 512, 2, 3)]
NORMS = {
    "batch norm": nn.BatchNorm2d,
    "group norm": lambda c: nn.GroupNorm(2, c),
    "one group": lambda c: nn.GroupNorm(1, c),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
}


def huge(sizes: tuple[int, ...], layout: str, scale: float = 1e30) -> Tensor:
    x = torch.randn(sizes, generator=seeded(sum(sizes))) * scale
    return x.contiguous(memory_format=LAYOUTS[layout])


def largest(sizes: tuple[int, ...], layout: str) -> Tensor:
    # Their sums are beyond float32, too.
    x = torch.rand(sizes, generator=seeded(sum(sizes))) * torch.finfo(torch.float32).max
    return x.contiguous(memory_format=LAYOUTS[layout])


def with_bias(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.bias.copy_(torch.linspace(-1, 1, len(norm.bias)))
    return norm


@pytest.mark.parametrize("values", [huge, largest])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_an_infinite_variance_gives_the_bias(
    name: str, sizes: tuple[int, ...], layout: str, values: Callable[[tuple[int, ...], str], Tensor]
) -> None:
    model = nn.Sequential(with_bias(NORMS[name](sizes[1])), nn.ReLU())
    convert(model)
    x = values(sizes, layout).requires_grad_()
    y = model(x)
    assert torch.equal(y, model[0].bias.relu()[:, None, None].expand(sizes))
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()
    assert (model[0].weight.grad == 0).all()
    if model[0].__dict__.get("track_running_stats"):
        assert model[0].running_var.isposinf().all()
        # The mean over 67 samples is taken in float32.
        assert values is largest or model[0].running_mean.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_a_variance_near_the_largest_number(sizes: tuple[int, ...], layout: str) -> None:
    # About 1e37: of squares float32 can add up at most 40, each rounded three times. PyTorch's
    # is infinite in channels_last.
    x = huge(sizes, layout, 3e18)
    for dims, operator, groups in (
        ((0, 2, 3), torch.ops.fastcnn.batch_norm_act_fwd, []),
        ((1, 3, 4), torch.ops.fastcnn.group_norm_act_fwd, [2]),
    ):
        exact = x.double().unflatten(1, (2, -1)).transpose(1, 2) if groups else x.double()
        var = operator(x, None, None, *(groups or [None]), 1e-5, 0)[2]
        expected = exact.var(dims, correction=0)
        assert ((var.double() - expected).abs() <= 120 * 2**-24 * expected).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_layer_norm(sizes: tuple[int, ...], layout: str) -> None:
    # PyTorch's gives NaN.
    y = with_bias(LayerNorm2d(sizes[1]))(huge(sizes, layout))
    exact = torch.linspace(-1, 1, sizes[1])[:, None, None].expand(sizes)
    assert torch.equal(y, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(bad: float, layout: str) -> None:
    # A variance is infinite of finite values alone.
    x = huge((2, 4, 6, 6), layout)
    x[1, 1, 2, 3] = bad
    statistics = torch.ops.fastcnn.batch_norm_act_fwd(x, None, None, None, 1e-5, 0)[1:]
    assert statistics[0].isfinite().tolist() == [True, False, True, True]
    assert statistics[1].isnan().tolist() == [False, True, False, False]
    for groups in (2, 4):
        _, mean, var = torch.ops.fastcnn.group_norm_act_fwd(x, None, None, groups, 1e-5, 0)
        assert torch.equal(mean.isfinite(), ~var.isnan())
        assert int(var.isnan().sum()) == 1
    _, mean, var = torch.ops.fastcnn.pixel_norm_act_fwd(x, None, None, 1e-5, 0)
    assert torch.equal(mean.isfinite(), ~var.isnan())
    assert int(var.isnan().sum()) == 1
