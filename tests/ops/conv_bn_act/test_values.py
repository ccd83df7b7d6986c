"""conv_bn_act against chains of torch.nn modules in float64.

The expected gradients are autograd's of conv2d, batch_norm, add and relu. A chain amplifies
roundings, and a rounding that crosses relu's non-differentiable point changes a gradient by as much
as it is; so values and gradients of whole chains are compared in float64, where the distance to it
is many roundings, and float32 and the half types with a smooth activation (support/roundings.py).
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from support.activations import ACTS, near_nondifferentiable
from support.chains import Chain, baseline, check_float64, expected_roundings, results
from support.shapes import LAYOUTS
from torch import Tensor, nn
from torch.autograd import gradcheck

from fastcnn import functional
from fastcnn.functional import ConvBnActStep
from fastcnn.lab import saved_for_backward
from fastcnn.nn import BatchNormAct2d, conv_bn_act


def bottleneck(conv_bias: bool = False, act: str = "relu", **bn: Any) -> Chain:
    """1x1, 3x3, 1x1 that widens: ResNet's."""
    return Chain(
        (nn.Conv2d(4, 6, 1, bias=conv_bias), BatchNormAct2d(6, act=act, **bn)),
        (nn.Conv2d(6, 6, 3, padding=1, bias=conv_bias), BatchNormAct2d(6, act=act, **bn)),
        (nn.Conv2d(6, 8, 1, bias=conv_bias), BatchNormAct2d(8, act=act, **bn)),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_chains(training: bool, residual: bool, layout: str) -> None:
    # Lengths 1 to 3: a first step that is also the last, both apart, and one in between.
    for length, act, bias in itertools.product((1, 2, 3), ACTS, (False, True)):
        steps = bottleneck(conv_bias=bias, act=act)
        chain = Chain(*list(zip(steps.convs, steps.bns, strict=True))[:length]).train(training)
        check_float64(chain, residual=residual, layout=layout)


@pytest.mark.parametrize(
    ("sizes", "conv"),
    [
        ((2, 4, 9, 8), nn.Conv2d(4, 6, 3, stride=2, padding=1)),  # downsampling, odd and even size
        ((2, 4, 9, 8), nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(1, 0))),  # unequal sides
        ((2, 4, 9, 8), nn.Conv2d(4, 6, 3, padding=2, dilation=2)),  # segmentation networks
        ((2, 4, 9, 8), nn.Conv2d(4, 8, 3, padding=1, groups=2)),  # ResNeXt
        ((2, 4, 9, 8), nn.Conv2d(4, 4, 3, padding=1, groups=2)),  # as many channels, not depthwise
        ((2, 4, 9, 8), nn.Conv2d(4, 4, 3, padding=1, groups=4)),  # depthwise
        ((2, 4, 9, 8), nn.Conv2d(4, 6, 3, padding=4)),  # more padding than kernel
        ((2, 4, 9, 8), nn.Conv2d(4, 1, 1)),  # one channel between: both layouts at once
        ((3, 4, 3, 3), nn.Conv2d(4, 6, 3)),  # 1x1 images between
        ((1, 4, 2, 1), nn.Conv2d(4, 6, 1)),  # two values a channel
        ((0, 4, 9, 8), nn.Conv2d(4, 6, 3)),  # an empty batch
    ],
    ids=str,
)
def test_convolutions(sizes: tuple[int, ...], conv: nn.Conv2d) -> None:
    # As the first step and, behind another, where backward recomputes its input.
    for layout, residual in itertools.product(LAYOUTS, [False, True]):
        first = (nn.Conv2d(sizes[1], sizes[1], 1, bias=False), BatchNormAct2d(sizes[1]))
        last = (copy.deepcopy(conv), BatchNormAct2d(conv.out_channels))
        check_float64(Chain(last), sizes, residual, layout)
        check_float64(Chain(first, last), sizes, residual, layout)


def test_frozen_batch_norms_among_trained_ones() -> None:
    # Fine-tuning: some normalise with running statistics, which then get no update.
    for frozen in ([0], [1], [2], [0, 2]):
        chain = bottleneck()
        for i in frozen:
            chain.bns[i].eval()
        before = chain.bns[frozen[0]].running_mean.double()
        after = check_float64(chain, residual=True)[f"bns.{frozen[0]}.running_mean"]
        assert torch.equal(before, after)


def test_batch_norms_of_other_kinds() -> None:
    # Without parameters; without running statistics; with the cumulative average; another eps.
    kinds = [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}]
    for kind, training in itertools.product(kinds, [True, False]):
        check_float64(bottleneck(**kind).train(training), residual=True)


def test_parameters_shared_between_steps() -> None:
    # As recurrent networks do: the gradients of both uses add up, both batches are counted.
    for momentum in (0.1, None):
        conv, bn = nn.Conv2d(4, 4, 3, padding=1), BatchNormAct2d(4, momentum=momentum)
        chain = Chain((conv, bn), (conv, bn))
        found = check_float64(chain)
        assert found["bns.0.num_batches_tracked"] == 2


def test_frozen_parameters_get_no_gradient() -> None:
    # Backward passes through them. A wrong one would be seen by an optimizer's weight decay.
    for i, part in itertools.product(range(3), ("convs", "bns")):
        chain = bottleneck(conv_bias=True)
        getattr(chain, part)[i].requires_grad_(False)
        found = check_float64(chain, residual=True)
        assert found[f"d{part}.{i}.weight"] is None
        assert found[f"d{part}.{i}.bias"] is None


def test_an_input_that_needs_no_gradient() -> None:
    # The first layer of every network: its convolution's dx is not even computed.
    for residual in (False, True):
        assert check_float64(bottleneck(), residual=residual, x_needs_grad=False)["dx"] is None


def test_nothing_needs_a_gradient() -> None:
    chain = bottleneck().requires_grad_(False)
    assert not chain(torch.randn(2, 4, 5, 5)).requires_grad


def check_rounding(layout: str, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor | None]:
    """Compare with float64, and the types of all results with eager's."""
    chain = bottleneck(conv_bias=True, act="silu").to(torch.float32 if autocast else dtype)
    x = torch.randn(4, 4, 9, 8).to(chain.convs[0].weight.dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    # In the dtype of the convolutions' outputs, as another layer's output is.
    added = torch.randn(4, 8, 9, 8).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    expected = expected_roundings(chain, x, added, dtype if autocast else None)
    with torch.autocast("cpu", dtype, enabled=autocast):
        eager, actual = results(baseline(chain), x, added), results(chain, x, added)
    for name, t in actual.items():
        assert t.dtype == eager[name].dtype, name
    expected.check(actual)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_types(layout: str, dtype: torch.dtype) -> None:
    check_rounding(layout, dtype, autocast=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout: str) -> None:
    # Parameters stay float32, images are bfloat16; gradients of parameters and of x are float32.
    found = check_rounding(layout, torch.bfloat16, autocast=True)
    assert found["y"].dtype is found["dresidual"].dtype is torch.bfloat16
    assert found["dx"].dtype is found["dconvs.0.weight"].dtype is torch.float32


def test_autocast_leaves_float64_alone() -> None:
    # As it does with F.conv2d.
    with torch.autocast("cpu", torch.bfloat16):
        check_float64(bottleneck(), residual=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTS)
def test_what_is_saved_for_backward(act: str, layout: str) -> None:
    # Counted in bytes: the input, every convolution output, mean and var of every step (in
    # evaluation as copies), and the output or the residual, which are of one size, where a residual
    # went through an activation. No activation in between.
    x = torch.randn(4, 4, 9, 8).contiguous(memory_format=LAYOUTS[layout])
    added = torch.randn(4, 8, 9, 8).contiguous(memory_format=LAYOUTS[layout])
    image = 4 * 9 * 8 * 4
    for training, residual in itertools.product([True, False], [None, added]):
        chain = bottleneck(act=act).train(training)
        state = [*chain.parameters(), *chain.buffers()]
        kept = saved_for_backward(lambda c=chain, r=residual: c(x, r), exclude=state)
        saved = 8 if residual is not None and act != "none" else 0
        assert kept == image * (4 + 6 + 6 + 8 + saved) + 2 * (6 + 6 + 8) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_are_recomputed_bit_for_bit(layout: str, dtype: torch.dtype) -> None:
    # Two steps keep no activation; cut in two chains they keep it. Both must give the same bits,
    # also where a rounding decides about a derivative, in the second weight's gradient above all.
    whole = bottleneck(conv_bias=True, act="relu6").to(dtype)
    parts = copy.deepcopy(whole)
    steps = list(zip(parts.convs, parts.bns, strict=True))
    x = torch.randn(4, 4, 9, 8).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    whole(x).square().sum().backward()
    a = x
    for step in steps:
        a = conv_bn_act(a, [step])
    a.square().sum().backward()
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, training: bool) -> None:
    # Two steps: the first one's activation is recomputed in backward.
    def image(*sizes: int) -> Tensor:
        t = torch.randn(sizes, dtype=torch.float64)
        return t.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    def vector() -> Tensor:
        return torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_()

    stats = (None, None) if training else (torch.zeros(2), torch.ones(2))
    mean, var = (None if t is None else t.double() for t in stats)

    def steps(w1: Tensor, w2: Tensor, b: Tensor, *norm: Tensor) -> list[ConvBnActStep]:
        return [
            ConvBnActStep(w1, b, 1, 1, 1, 1, mean, var, *norm[:2], training, act="relu6"),
            ConvBnActStep(w2, None, 1, 0, 1, 2, mean, var, *norm[2:], training, act="relu"),
        ]

    def run(x: Tensor, r: Tensor, *parameters: Tensor) -> Tensor:
        return functional.conv_bn_act(x, steps(*parameters), r)

    near = torch.tensor(True)
    while near.any():  # gradcheck's steps of 1e-6 must not cross a non-differentiable point
        leaves = [image(2, 2, 4, 3), image(2, 2, 4, 3), image(2, 2, 3, 3), image(2, 1, 1, 1)]
        leaves += [vector() for _ in range(5)]
        x, r, *parameters = leaves
        first, second = steps(*parameters)
        z1 = functional.conv_bn_act(x, [first._replace(act="none")])
        z2 = functional.conv_bn_act(x, [first, second._replace(act="none")], r)
        near = torch.cat(
            [near_nondifferentiable(z1, "relu6", 1e-3), near_nondifferentiable(z2, "relu", 1e-3)]
        )

    # In training the convolution's bias has gradient 0, which differences meet to 1e-7.
    assert gradcheck(run, leaves)
