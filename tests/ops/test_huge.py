"""Values whose squares are beyond float32: finite where PyTorch is, with its infinite variance."""

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


def huge(sizes: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(sizes, generator=seeded(sum(sizes))) * 1e30
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def with_bias(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.bias.copy_(torch.linspace(-1, 1, len(norm.bias)))
    return norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_an_infinite_variance_gives_the_bias(
    name: str, sizes: tuple[int, ...], layout: str
) -> None:
    model = nn.Sequential(with_bias(NORMS[name](sizes[1])), nn.ReLU())
    convert(model)
    x = huge(sizes, layout).requires_grad_()
    y = model(x)
    assert torch.equal(y, model[0].bias.relu()[:, None, None].expand(sizes))
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()
    assert (model[0].weight.grad == 0).all()
    if model[0].__dict__.get("track_running_stats"):
        assert model[0].running_var.isposinf().all()
        assert model[0].running_mean.isfinite().all()


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
