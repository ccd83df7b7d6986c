"""Evaluation of conv_bn_act: batch norms folded into the convolutions of oneDNN."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.activations import ACTS
from support.chains import Chain, Stage, baseline, conv_bn, expected_roundings, results, stage
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.nn import BatchNormAct2d, Block, conv_bn_act, conv_bn_act_blocks
from fastcnn.ops.conv2d.onednn import folds

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
    model: Stage, residual: bool, dtype: torch.dtype, autocast: bool, *modes: Callable[[], Any]
) -> None:
    """In both layouts. Weights are rounded once more where the batch norm is folded into them."""
    model = model.eval().to(torch.float32 if autocast else dtype)
    x, plain = torch.randn(2, 4, 9, 8), baseline(model)
    x = x.to(torch.float32 if autocast else dtype)
    with torch.no_grad():
        added = torch.randn_like(plain(x)).to(dtype) if residual else None
        expected = expected_roundings(model, x, added, dtype)
    for layout, mode in itertools.product(LAYOUTS.values(), modes or [torch.no_grad]):
        model, plain = model.to(memory_format=layout), plain.to(memory_format=layout)
        given = [t if t is None else t.contiguous(memory_format=layout) for t in (x, added)]
        with mode(), torch.autocast("cpu", dtype, enabled=autocast):
            found, eager = results(model, *given), results(plain, *given)
        assert found["y"].dtype is eager["y"].dtype
        assert found["y"].stride() == eager["y"].stride()
        expected.check(found)


TYPES = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


@pytest.mark.parametrize(("dtype", "autocast"), TYPES, ids=["float32", "bfloat16", "autocast"])
def test_activations(dtype: torch.dtype, autocast: bool) -> None:
    for act, residual in itertools.product(ACTS, [False, True]):
        chain = Chain(conv_bn(4, 16, 3, act), conv_bn(16, 8, 3, act, 2, bias=True))
        check(chain, residual, dtype, autocast, torch.no_grad, torch.inference_mode)


@pytest.mark.parametrize(
    "step",
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), BatchNormAct2d(8)),  # ResNeXt
        (nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), BatchNormAct2d(4)),  # its 3x3
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), BatchNormAct2d(4)),  # depthwise
        (nn.Conv2d(4, 8, 3, padding=2, dilation=2), BatchNormAct2d(8)),
        (nn.Conv2d(4, 8, (3, 1), (1, 2), (1, 0)), BatchNormAct2d(8)),  # unequal sides
        (nn.Conv2d(4, 8, 3), BatchNormAct2d(8, affine=False)),
        (nn.Conv2d(4, 8, 3, bias=False), BatchNormAct2d(8, affine=False, eps=0.5)),
        (nn.Conv2d(4, 8, 3, padding=1), BatchNormAct2d(8), nn.MaxPool2d(3, 2, 1)),
    ],
    ids=[
        "groups",
        "groups of a square",
        "depthwise",
        "dilation",
        "sides",
        "no affine",
        "eps",
        "pooling",
    ],
)
def test_convolutions(step: Any) -> None:
    for dtype, autocast in TYPES:
        check(Chain(step), len(step) == 2, dtype, autocast)


@pytest.mark.parametrize(("dtype", "autocast"), TYPES, ids=["float32", "bfloat16", "autocast"])
def test_blocks(dtype: torch.dtype, autocast: bool) -> None:
    # Residual adds, projections; the same in every memory level.
    model = stage("projection", "identity", "two steps", "none")
    check(model, False, dtype, autocast)
    x, model = torch.randn(2, 4, 9, 8).to(dtype), model.to(dtype)
    for layout in LAYOUTS.values():
        with torch.no_grad():
            y = model(x.contiguous(memory_format=layout))
            for level in ("low", "lowest"):
                model.memory = level
                assert torch.equal(model(x.contiguous(memory_format=layout)), y)
            model.memory = "default"


def test_each_step_is_one_convolution_of_onednn() -> None:
    # Of the types that it has on this processor; the others by PyTorch's convolution.
    model = stage("projection", "identity").eval()
    x = torch.randn(2, 4, 9, 8)
    onednn = {t for t in (torch.float32, torch.bfloat16) if folds(x.to(t))}
    assert torch.float32 in onednn
    for memory, mode in itertools.product(
        ("default", "low", "lowest"), (torch.no_grad, torch.inference_mode)
    ):
        model.memory = memory
        for dtype in (torch.float32, torch.bfloat16):
            with mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                names = convolutions(lambda: model(x))
            # Three steps and a shortcut, three steps; the last of each block adds.
            expected = [ALONE] * 3 + [ADDED] + [ALONE] * 2 + [ADDED]
            assert names == (expected if dtype in onednn else ["aten.convolution.default"] * 7)
    # Frozen, no gradient is required either.
    names = convolutions(lambda: model.requires_grad_(False)(x))
    assert names.count(ADDED) == 2


def test_where_it_is_not_used() -> None:
    x = torch.randn(2, 4, 9, 8)
    step = conv_bn(4, 6, 3)
    plain = ["aten.convolution.default"]
    chain = Chain(step).eval().requires_grad_(False)
    added = torch.randn(2, 6, 9, 8)
    assert convolutions(lambda: chain(x, added)) == [ADDED]
    # A gradient is required: of the input, the residual, or any one parameter.
    assert convolutions(lambda: chain(x.clone().requires_grad_(), added)) == plain
    assert convolutions(lambda: chain(x, added.clone().requires_grad_())) == plain
    for p in chain.parameters():
        p.requires_grad_(True)
        assert convolutions(lambda: chain(x)) == plain
        p.requires_grad_(False)
    # A type that oneDNN has not; the batch's own statistics.
    wide = copy.deepcopy(chain).double()
    assert convolutions(lambda: wide(x.double())) == plain
    assert convolutions(lambda: copy.deepcopy(chain).train()(x)) == plain


@pytorchs_own_warnings
def test_tangents_are_not_lost() -> None:
    # oneDNN's operators have no forward-mode derivative: refused, not a tangent of 0.
    chain = Chain(conv_bn(4, 6, 3)).eval().requires_grad_(False)
    x = torch.randn(2, 4, 9, 8)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(chain, (x,), (torch.ones_like(x),))


def test_torch_func_requires_a_gradient_too() -> None:
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
        chain, x = Chain(conv_bn(sizes[1], 6, 3)).eval(), torch.randn(sizes)
        with torch.no_grad():
            for added in (None, torch.randn_like(baseline(chain)(x))):
                found = results(chain, x, added)
                expected_roundings(chain, x, added, torch.float32).check(found)


@pytorchs_own_warnings
def test_compiled() -> None:
    # One graph; the weights are folded there too.
    model = stage("projection", "identity", act="silu").eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        expected = expected_roundings(model, x, autocast=torch.float32)
    expected.check({**expected.exact, "y": y})


@pytorchs_own_warnings
def test_exported_programs_have_the_plain_operators() -> None:
    # They must run where there is no oneDNN. In float64, to compare the function (tolerance.py).
    chain = Chain(conv_bn(4, 6, 3)).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        program = torch.export.export(chain, (x,))
        wide = torch.export.export(copy.deepcopy(chain).double(), (x.double(),))
        assert_same(wide.module()(x.double()), copy.deepcopy(chain).double()(x.double()), name="y")
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
