"""GroupNormAct, LayerNorm2d and InstanceNormAct2d against the torch.nn layers they replace."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.seeds import seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded, assert_same, unit_roundoff, walk
from torch import Tensor, nn

from fastcnn import functional
from fastcnn.lab import saved_for_backward
from fastcnn.nn import GroupNormAct, InstanceNormAct2d, LayerNorm2d

X = torch.randn(2, 6, 4, 4)
C6 = torch.ones(6)

INSTANCE_NORMS: list[dict[str, Any]] = [
    dict(zip(("affine", "track_running_stats", "momentum"), flags, strict=True))
    for flags in itertools.product([False, True], [False, True], [0.1, 0.7, None])
]


def images(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = seeded(seed)
    return (2 * torch.randn(3, 6, 5, 7, generator=generator) + 1).to(dtype)


def assert_same_module(actual: nn.Module, expected: nn.Module, x: Tensor, act: Any) -> None:
    """The same output, gradients and state after one batch."""
    grads = []
    for module, after in ((actual, lambda y: y), (expected, act)):
        leaf = x.detach().requires_grad_()
        after(module(leaf)).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    assert_same(*grads)
    states = [module.state_dict() for module in (actual, expected)]
    assert list(states[0]) == list(states[1])
    assert_same(*states)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kwargs", INSTANCE_NORMS, ids=str)
def test_instance_norm_step_by_step(kwargs: dict[str, Any], layout: str) -> None:
    # Training, evaluation that must leave the statistics, and training again; and tracking switched
    # off after construction, where torch goes on to move what there is.
    actual = InstanceNormAct2d(6, **kwargs, dtype=torch.float64)
    expected = nn.InstanceNorm2d(6, **kwargs, dtype=torch.float64)
    for i, training in enumerate([True, True, False, True, False]):
        if i == 3:
            actual.track_running_stats = expected.track_running_stats = False
        x = images(i).contiguous(memory_format=LAYOUTS[layout])
        assert_same_module(actual.train(training), expected.train(training), x, F.relu)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [[float("inf")], [float("-inf")], [float("inf"), float("-inf")]])
def test_an_infinity_moves_the_running_statistics_as_in_torch(
    bad: list[float], layout: str
) -> None:
    # The mean to it, the variance to NaN, and only of its channel; 9216 pixels are two chunks.
    for pixels, dtype in itertools.product((5, 96), (torch.float32, torch.bfloat16)):
        actual, expected = (
            make(3, track_running_stats=True, dtype=dtype)
            for make in (InstanceNormAct2d, nn.InstanceNorm2d)
        )
        x = torch.randn(2, 3, pixels, pixels).to(dtype, memory_format=LAYOUTS[layout])
        for i, value in enumerate(bad):
            x[1, 1, -1, i] = value
        y, eager = actual(x), F.relu(expected(x))
        assert torch.equal(y.isnan(), eager.isnan())
        for name in ("running_mean", "running_var"):
            ours, theirs = getattr(actual, name)[1], getattr(expected, name)[1]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            assert getattr(actual, name)[::2].isfinite().all()


def test_instance_norm_in_half() -> None:
    # model.to(bfloat16): statistics are half too, and stay so.
    actual = InstanceNormAct2d(6, track_running_stats=True, dtype=torch.bfloat16)
    exact = nn.InstanceNorm2d(6, track_running_stats=True, dtype=torch.float64)
    x = images(0, torch.bfloat16)
    actual(x), exact(x.double())
    # A sample's variance is at most the mean of its squares, and the sum of 35 squares around a
    # center that is near has four times their error (norm_cases.norm_errors).
    for name, magnitude in (("mean", x.double().abs()), ("var", x.double().square())):
        error = 4 * walk(35, x.dtype) * magnitude.mean((0, 2, 3))
        value, expected = (getattr(module, f"running_{name}") for module in (actual, exact))
        assert value.dtype is torch.bfloat16
        assert_rounded(name, value, expected, error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norm_on_permuted_data(layout: str) -> None:
    # What torchvision's ConvNeXt does, in its four steps; the layout stays x's.
    for kwargs in ({}, {"eps": 1e-6}, {"bias": False}, {"elementwise_affine": False}):
        actual = LayerNorm2d(6, **kwargs, dtype=torch.float64)
        expected = nn.LayerNorm(6, **kwargs, dtype=torch.float64)
        for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
            nn.init.normal_(p)
            q.data.copy_(p)
        x = images(0).contiguous(memory_format=LAYOUTS[layout])
        assert actual(x).stride() == x.stride()

        def permuted(x: Tensor, module: nn.Module = expected) -> Tensor:
            return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        assert_same(actual(x), permuted(x))
        for module in (actual, permuted):
            module(x.requires_grad_()).square().sum().backward()
        for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
            assert_same(p.grad, q.grad)


@pytest.mark.parametrize("kwargs", [{}, {"eps": 0.1}, {"affine": False}], ids=str)
def test_group_norm(kwargs: dict[str, Any]) -> None:
    actual = GroupNormAct(3, 6, **kwargs, act="silu", dtype=torch.float64)
    expected = nn.GroupNorm(3, 6, **kwargs, dtype=torch.float64)
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        nn.init.normal_(p)
        q.data.copy_(p)
    assert_same_module(actual, expected, images(0), F.silu)


def test_they_are_torchs_layers() -> None:
    # Code that freezes or exempts from weight decay asks with isinstance; weights load strictly.
    pairs = [
        (GroupNormAct(3, 6, act="relu6"), nn.GroupNorm(3, 6), "relu6"),
        (LayerNorm2d(6), nn.LayerNorm(6), "none"),
        (
            InstanceNormAct2d(6, affine=True, track_running_stats=True),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            "relu",
        ),
    ]
    for ours, theirs, act in pairs:
        assert isinstance(ours, type(theirs))
        assert repr(ours).split("(", 1)[1] == repr(theirs).split("(", 1)[1][:-1] + f", act={act})"
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_for_backward(layout: str) -> None:
    # In bytes: x and the statistics. y never, whatever the activation: z is recomputed.
    x = images(0, torch.float32).contiguous(memory_format=LAYOUTS[layout])
    for module, statistics in (
        (GroupNormAct(3, 6, act="gelu"), 3 * 3),
        (LayerNorm2d(6, act="silu"), 3 * 5 * 7),
        (InstanceNormAct2d(6, act="relu"), 3 * 6),
    ):
        kept = saved_for_backward(lambda m=module: m(x.requires_grad_()), module.parameters())
        assert kept == x.nbytes + 2 * statistics * 4


def group_norm(**arguments: Any) -> Tensor:
    good = {"input": X, "num_groups": 3, "weight": C6, "bias": C6}
    return functional.group_norm_act(**(good | arguments))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, r"input: expected a Tensor, got list"),
        ({"input": X[0]}, ValueError, r"input: expected 4 dimensions .*, got 3"),
        ({"input": X.mT}, ValueError, r"input: expected a dense .* strides .*; call"),
        ({"num_groups": 4}, ValueError, r"num_groups: expected a divisor of 6 channels, got 4"),
        ({"num_groups": 0}, ValueError, r"num_groups: expected a divisor of 6 channels, got 0"),
        ({"num_groups": 2.0}, TypeError, r"num_groups: expected an int, got float"),
        ({"weight": C6[1:]}, ValueError, r"weight: expected 6 numbers, .* got sizes \[5\]"),
        ({"bias": C6.double()}, TypeError, r"bias: expected torch.float32 .*float64"),
        ({"eps": "small"}, TypeError, r"eps: expected a number, got str"),
        ({"eps": 0.0}, ValueError, r"eps: expected a number above 0, got 0.0"),
        ({"eps": float("nan")}, ValueError, r"eps: expected a number above 0, got nan"),
        ({"act": "tanh"}, ValueError, r"act: expected one of none, relu, .*, got 'tanh'"),
        ({"input": X[:1, :, :1, :1].clone(), "num_groups": 6}, ValueError, r"more than 1 value"),
    ],
)
def test_errors(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^group_norm_act: .*{message}"):
        group_norm(**bad)


def test_one_value_a_group_is_refused_where_torch_does() -> None:
    # Of a single sample, and for instance norm always; else y is beta, and no gradient reaches x.
    one = torch.randn(1, 6, 1, 1)
    for refuses in (lambda: F.group_norm(one, 6), lambda: group_norm(input=one, num_groups=6)):
        with pytest.raises(ValueError, match="more than 1 value"):
            refuses()
    x = torch.randn(2, 6, 1, 1, requires_grad=True)
    y = group_norm(input=x, num_groups=6)
    assert torch.equal(y, torch.ones_like(y))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.zeros_like(dx))
    # PyTorch rounds x * rstd and mean * rstd, both with rstd = 1 / sqrt(eps) = 316, and what it
    # makes of beta and either: four roundings of values of at most 317 times the largest x, or 1.
    rounding = 4 * unit_roundoff(x.dtype) * 317 * max(x.abs().max().item(), 1)
    torch.testing.assert_close(F.group_norm(x, 6, C6, C6).relu(), y, rtol=0, atol=rounding)
    for module in (nn.InstanceNorm2d(6), InstanceNormAct2d(6)):
        with pytest.raises(ValueError, match="more than 1"):
            module(x)


def test_errors_of_the_modules() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm2d: normalized_shape: .*, got \(6, 4, 4\)"):
        LayerNorm2d((6, 4, 4))
    with pytest.raises(ValueError, match="LayerNorm2d: input: expected 5 channels, got 6"):
        LayerNorm2d(5)(X)
    with pytest.raises(ValueError, match="InstanceNormAct2d: weight: expected 6 numbers"):
        InstanceNormAct2d(5, affine=True)(X)
    for module, arguments in (
        (GroupNormAct, (3, 6)),
        (LayerNorm2d, (6,)),
        (InstanceNormAct2d, (6,)),
    ):
        with pytest.raises(ValueError, match=rf"{module.__name__}: act: .*, got 'tanh'"):
            module(*arguments, act="tanh")
