"""Evaluation of conv_bn_act: batch norms folded into the convolutions of oneDNN."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from activations import ACTS
from chains import Chain, Stage, conv_bn, stage
from shapes import LAYOUTS
from tolerance import assert_as_exact_as_torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.nn import BatchNormAct2d, Block, conv_bn_act, conv_bn_act_blocks

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)

# Dynamo looks at parts of torch.jit.
pytorchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Convolutions(TorchDispatchMode):
    """Notes the names of the convolutions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "conv" in str(op):
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def convolutions(run: Callable[[], Tensor]) -> list[str]:
    with Convolutions() as found:
        run()
    return found.names


ALONE, ADDED = "mkldnn._convolution_pointwise.default", "mkldnn._convolution_pointwise.binary"


def check(
    model: Stage, x: Tensor, dtype: torch.dtype, layout: str, residual: bool, autocast: bool
) -> None:
    """By eager's own error against float64, pooled over 8 draws of the input: one draw is too few
    to tell 2 from 1 (tests/test_conv_bn_act.py says more)."""
    model = model.eval().to(torch.float32 if autocast else dtype)
    model = model.to(memory_format=LAYOUTS[layout])
    plain = copy.deepcopy(model)
    plain.fused = False
    exact_model = copy.deepcopy(plain).double()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(8):
        x = torch.randn_like(x)
        x = x.to(torch.float32 if autocast else dtype).contiguous(memory_format=LAYOUTS[layout])
        added = None
        if residual:
            added = torch.randn_like(exact_model(x.double())).to(dtype)
        exact = exact_model(x.double(), None if added is None else added.double())
        with torch.autocast("cpu", dtype, enabled=autocast):
            y, eager = model(x, added), plain(x, added)
        assert y.dtype is eager.dtype
        assert y.stride() == eager.stride()
        found.append((y, eager, exact))
    actual, eager, exact = (torch.stack(t) for t in zip(*found, strict=True))
    assert_as_exact_as_torch(f"{model}", actual, eager, exact)


TYPES = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


@pytest.mark.parametrize(("dtype", "autocast"), TYPES, ids=["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_activations(mode: Callable[[], Any], dtype: torch.dtype, autocast: bool) -> None:
    for act, residual, layout in itertools.product(ACTS, [False, True], LAYOUTS):
        chain = Chain(conv_bn(4, 16, 3, act), conv_bn(16, 8, 3, act, 2, bias=True))
        with mode():
            check(chain, torch.randn(2, 4, 9, 8), dtype, layout, residual, autocast)


@pytest.mark.parametrize(
    "step",
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), BatchNormAct2d(8)),  # ResNeXt
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), BatchNormAct2d(4)),  # depthwise
        (nn.Conv2d(4, 8, 3, padding=2, dilation=2), BatchNormAct2d(8)),
        (nn.Conv2d(4, 8, (3, 1), (1, 2), (1, 0)), BatchNormAct2d(8)),  # unequal sides
        (nn.Conv2d(4, 8, 3), BatchNormAct2d(8, affine=False)),
        (nn.Conv2d(4, 8, 3, bias=False), BatchNormAct2d(8, affine=False, eps=0.5)),
        (nn.Conv2d(4, 8, 3, padding=1), BatchNormAct2d(8), nn.MaxPool2d(3, 2, 1)),
    ],
    ids=["groups", "depthwise", "dilation", "sides", "no affine", "eps", "pooling"],
)
def test_convolutions(step: Any) -> None:
    with torch.no_grad():
        for (dtype, autocast), layout in itertools.product(TYPES, LAYOUTS):
            residual = len(step) == 2
            check(Chain(step), torch.randn(2, 4, 9, 8), dtype, layout, residual, autocast)


@pytest.mark.parametrize(("dtype", "autocast"), TYPES, ids=["float32", "bfloat16", "autocast"])
def test_blocks(dtype: torch.dtype, autocast: bool) -> None:
    # Residual adds, projections; the same in every memory level.
    for layout in LAYOUTS:
        model = stage("projection", "identity", "two steps", "none")
        with torch.no_grad():
            check(model, torch.randn(2, 4, 9, 8), dtype, layout, False, autocast)
            x = torch.randn(2, 4, 9, 8).contiguous(memory_format=LAYOUTS[layout])
            model = model.float()
            y = model(x)
            for model.memory in ("low", "lowest"):
                assert torch.equal(model(x), y)


def test_each_step_is_one_convolution_of_onednn() -> None:
    model = stage("projection", "identity").eval()
    x = torch.randn(2, 4, 9, 8)
    for memory, mode in itertools.product(
        ("default", "low", "lowest"), (torch.no_grad, torch.inference_mode)
    ):
        model.memory = memory
        for dtype in (torch.float32, torch.bfloat16):
            with mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                names = convolutions(lambda: model(x))
            # Three steps and a shortcut, three steps; the last of each block adds.
            assert names == [ALONE] * 3 + [ADDED] + [ALONE] * 2 + [ADDED]
    # Frozen, there is no gradient to ask for either.
    names = convolutions(lambda: model.requires_grad_(False)(x))
    assert names.count(ADDED) == 2


def test_where_it_is_not_used() -> None:
    x = torch.randn(2, 4, 9, 8)
    step = conv_bn(4, 6, 3)
    plain = ["aten.convolution.default"]
    chain = Chain(step).eval().requires_grad_(False)
    added = torch.randn(2, 6, 9, 8)
    assert convolutions(lambda: chain(x, added)) == [ADDED]
    # Somebody asks for a gradient: of the input, the residual, or any one parameter.
    assert convolutions(lambda: chain(x.clone().requires_grad_(), added)) == plain
    assert convolutions(lambda: chain(x, added.clone().requires_grad_())) == plain
    for p in chain.parameters():
        p.requires_grad_(True)
        assert convolutions(lambda: chain(x)) == plain
        p.requires_grad_(False)
    # Types that oneDNN lacks on some processors or at all; the batch's own statistics.
    for dtype in (torch.float16, torch.float64):
        half = copy.deepcopy(chain).to(dtype)
        assert convolutions(lambda h=half, d=dtype: h(x.to(d))) == plain
    assert convolutions(lambda: copy.deepcopy(chain).train()(x)) == plain


@pytorchs_own_warnings
def test_tangents_are_not_lost() -> None:
    # oneDNN's operators have no forward-mode derivative: refused, not a tangent of 0.
    chain = Chain(conv_bn(4, 6, 3)).eval().requires_grad_(False)
    x = torch.randn(2, 4, 9, 8)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(chain, (x,), (torch.ones_like(x),))


def test_torch_func_asks_for_a_gradient_too() -> None:
    chain = Chain(conv_bn(4, 6, 3)).eval().requires_grad_(False)
    x = torch.randn(2, 4, 9, 8)
    leaf = x.clone().requires_grad_()
    chain(leaf).square().sum().backward()
    assert torch.equal(torch.func.grad(lambda t: chain(t).square().sum())(x), leaf.grad)


def test_parameters_may_change_between_calls() -> None:
    # Folded at every call: an optimizer's step, or other running statistics, are seen.
    chain, x = Chain(conv_bn(4, 6, 3)).eval(), torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        before = chain(x)
        for t in (chain.convs[0].weight, chain.bns[0].weight, chain.bns[0].running_var):
            t.mul_(1.5)
            after = chain(x)
            assert not torch.equal(after, before)
            before = after


def test_a_residual_in_another_layout_is_refused() -> None:
    # As in training, rather than copied in silence.
    chain = Chain(conv_bn(4, 6, 3)).eval()
    x, added = torch.randn(2, 4, 9, 8), torch.randn(2, 6, 9, 8)
    cl = torch.channels_last
    for grad in (True, False):
        for a, b in ((x, added.to(memory_format=cl)), (x.to(memory_format=cl), added)):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(ValueError, match="residual: expected the input's memory format"),
            ):
                chain(a, b)


def test_empty_and_ambiguous_batches() -> None:
    # No images; 1x1 images and one channel, which are NCHW and channels_last at once.
    for sizes in ((0, 4, 9, 8), (3, 4, 1, 1), (2, 1, 5, 6)):
        chain = Chain(conv_bn(sizes[1], 6, 3)).eval()
        x = torch.randn(sizes)
        expected = chain(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(chain(x), expected)
            torch.testing.assert_close(
                chain(x, expected), (chain.bns[0](chain.convs[0](x), expected))
            )


@pytorchs_own_warnings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype: torch.dtype) -> None:
    # One graph; the weights are folded there too. Against eager by the same yardstick.
    model = Stage(*stage("projection", "identity", act="silu").blocks).eval().to(dtype)
    plain = copy.deepcopy(model)
    plain.fused = False
    x = torch.randn(2, 4, 9, 8).to(dtype)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        exact = copy.deepcopy(plain).double()(x.double())
        assert_as_exact_as_torch("y", compiled(x), plain(x), exact)


@pytorchs_own_warnings
def test_exported_programs_have_the_plain_operators() -> None:
    # They must run where there is no oneDNN.
    chain = Chain(conv_bn(4, 6, 3)).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        program = torch.export.export(chain, (x,))
        torch.testing.assert_close(program.module()(x), chain(x))
    assert "mkldnn" not in str(program.graph)


def test_the_input_as_shortcut() -> None:
    # An empty shortcut is the input: what folding adds is then the tensor that it convolves.
    step = conv_bn(4, 4, 3)
    step[1].eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        expected = conv_bn_act(x, [step], x)
        assert torch.equal(conv_bn_act(x, [step], ()), expected)
        assert torch.equal(conv_bn_act_blocks(x, [Block([step], ())]), expected)
