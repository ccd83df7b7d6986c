"""FoldedConv2d: a convolution with its batch norm, folded once and kept while nothing changes."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from support.activations import ACTS
from support.conv2d_folded_cases import Pair, kept, pair
from support.roundings import Expected
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import nn

from fastcnn.ops.conv2d.onednn import folds
from fastcnn.ops.conv_bn_act.folded import FoldedConv2d

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)
pytorchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CL = torch.channels_last


def check(model: Pair, dtype: torch.dtype, autocast: bool, residual: bool) -> None:
    """Against float64, and to the bit as the step that saves nothing; both layouts and modes.

    Written into the residual it is another kernel's sum on SSE4.1: near, and not to the bit.
    """
    exact = copy.deepcopy(model).double()
    model = copy.deepcopy(model).to(torch.float32 if autocast else dtype)
    x = torch.randn(2, model.conv.in_channels, 9, 8).to(torch.float32 if autocast else dtype)
    with torch.no_grad():
        added = torch.randn_like(model.plain(x)).to(dtype) if residual else None
        wide = [t if t is None else t.double() for t in (x, added)]
        # Weights are rounded after the batch norm is folded into them.
        state = torch.float32 if autocast else dtype
        expected = Expected(lambda: {"y": exact.plain(*wide)}, dtype, state, autocast=True)
    for layout, mode in itertools.product(LAYOUTS.values(), (torch.no_grad, torch.inference_mode)):
        given = [t if t is None else t.contiguous(memory_format=layout) for t in (x, added)]
        with mode(), torch.autocast("cpu", dtype, enabled=autocast):
            y, eager, step = model(*given), model.plain(*given), model.step(*given)
            into = model(given[0], None if added is None else given[1].clone(), dies=True)
        assert y.dtype is eager.dtype
        assert y.stride() == step.stride() == into.stride()
        assert torch.equal(y, step)
        expected.check({"y": y})
        expected.check({"y": into})
        if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
            assert torch.equal(into, y)


TYPES = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
CONVOLUTIONS = {
    "plain": {},
    "groups": {"groups": 2},
    "groups of a square": {"c_out": 4, "groups": 2},
    "depthwise": {"c_out": 4, "groups": 4},
    "dilation": {"dilation": 2, "padding": 2},
    "stride": {"stride": (1, 2), "bias": False},
    "1x1": {"kernel_size": 1, "padding": 0},
    "one channel": {"c_in": 1, "c_out": 1},
}


@pytest.mark.parametrize(("dtype", "autocast"), TYPES, ids=["float32", "bfloat16", "autocast"])
def test_results(dtype: torch.dtype, autocast: bool) -> None:
    for residual in (False, True):
        for act in ACTS:
            check(pair(act=act), dtype, autocast, residual)
        for options in CONVOLUTIONS.values():
            model = pair(**options)
            check(model, dtype, autocast, residual)
            check(Pair(model.conv, None, "silu"), dtype, autocast, residual)


def test_weights_are_kept_for_the_last_sizes() -> None:
    # In the types that oneDNN has on this processor; the others are folded at every call.
    model = pair()
    types = [t for t in (torch.float32, torch.bfloat16) if folds(torch.empty(0, dtype=t))]
    assert types
    with torch.no_grad():
        for layout, dtype in itertools.product(LAYOUTS.values(), types):
            model = model.to(dtype)
            for size in (9, 7, 5, 3):
                x = torch.randn(2, 4, size, 8, dtype=dtype).contiguous(memory_format=layout)
                first = model(x)
                assert kept(partial(model, x))
                assert torch.equal(model(x), first)
        x = torch.randn(2, 4, 11, 8, dtype=types[-1]).contiguous(memory_format=CL)
        model(x)
        assert "kept for 4 inputs" in repr(model.folded)


def test_a_residual_that_dies_may_hold_the_output() -> None:
    model, x = pair(), torch.randn(2, 4, 9, 8).contiguous(memory_format=CL)
    with torch.no_grad():
        residual = torch.randn_like(model(x))
        assert model(x, residual).data_ptr() != residual.data_ptr()
        assert model(x, residual, dies=True) is residual
        # But not where the convolution reads it.
        model, x = pair(4, 4), x.clone(memory_format=torch.preserve_format)
        expected = model.step(x, x)
        assert torch.equal(model(x, x, dies=True), expected)
        # And PyTorch refuses to write into a tensor of inference mode elsewhere.
        with torch.inference_mode():
            residual = torch.randn_like(x)
        expected = model.step(x, residual)
        assert torch.equal(model(x, residual, dies=True), expected)


def test_gradients_and_torch_func() -> None:
    # In float64: another way to the same function (support/tolerance.py).
    model = pair(act="silu").double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    model.plain(plain).square().sum().backward()
    assert_same(leaf.grad, plain.grad, name="dx")
    assert model.conv.weight.grad is not None
    model.requires_grad_(False)
    found = torch.func.grad(lambda t: model(t).square().sum())(x)
    assert_same(found, plain.grad, name="torch.func's dx")
    weights = {k: 2 * v for k, v in model.state_dict().items()}
    y = torch.func.functional_call(model, weights, (x,))
    model.load_state_dict(weights)
    assert torch.equal(y, model(x))


def test_copies_and_pickles_keep_nothing() -> None:
    model, x = pair(), torch.randn(2, 4, 9, 8).contiguous(memory_format=CL)
    with torch.no_grad():
        y = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.folded.conv is other.conv
            assert "kept for 0 inputs" in repr(other.folded)
            assert torch.equal(other(x), y)
            other.conv.weight.mul_(2)
            assert torch.equal(other(x), other.step(x))
        assert torch.equal(model(x), y)


def test_errors() -> None:
    model, x = pair(), torch.randn(2, 4, 9, 8)
    conv = model.conv
    with torch.no_grad():
        y = model(x)
        for _ in range(2):  # what was refused is not kept
            with pytest.raises(ValueError, match="residual: expected sizes"):
                model(x, y[:1])
            with pytest.raises(TypeError, match="residual: expected"):
                model(x, y.bfloat16())
            with pytest.raises(ValueError, match="residual: expected the input's memory format"):
                model(x, y.contiguous(memory_format=CL))
            with pytest.raises(
                ValueError, match=r"input: expected 4 channels for weight .*, got 3"
            ):
                model(x[:, :3].clone())
            with pytest.raises(ValueError, match="dense NCHW or channels_last"):
                model(x[:, :, ::2])
            with pytest.raises(TypeError, match="weight: expected"):
                model(x.bfloat16())
            with pytest.raises(TypeError, match="input: expected a Tensor"):
                model(None)
        with pytest.raises(ValueError, match="batch norm in evaluation"):
            model.train()(x)
    with pytest.raises(ValueError, match="act: expected one of"):
        FoldedConv2d(conv, act="tanh")
    for kernel, options in ((2, {"padding": "same"}), (3, {"padding_mode": "circular"})):
        with pytest.raises(ValueError, match="padding of both sides alike"):
            FoldedConv2d(nn.Conv2d(4, 4, kernel, **options))


def test_images_of_one_pixel_with_a_residual() -> None:
    # In channels_last torch 2.11's oneDNN "could not create a memory" for their sum.
    for layout, dtype in itertools.product(LAYOUTS.values(), (torch.float32, torch.bfloat16)):
        layer = pair(8, 16).to(dtype)
        x, residual = (torch.randn(2, c, 1, 1).to(dtype, memory_format=layout) for c in (8, 16))
        before = residual.clone()
        with torch.no_grad():
            assert torch.equal(layer(x, residual), layer.step(x, residual))
        assert torch.equal(residual, before)


def test_other_types_empty_batches_and_narrow_images() -> None:
    with torch.no_grad():
        for dtype in (torch.float64, torch.float16):
            model, x = pair().to(dtype), torch.randn(2, 4, 9, 8, dtype=dtype)
            assert torch.equal(model(x), model.step(x))
        for sizes in ((0, 4, 9, 8), (3, 4, 1, 1), (2, 4, 3, 1)):
            model = pair(groups=2, padding=3, kernel_size=3, stride=3)
            x = torch.randn(sizes).contiguous(memory_format=CL)
            assert torch.equal(model(x), model.step(x))


@pytorchs_own_warnings
@pytest.mark.parametrize("with_norm", [True, False])
def test_compiled_and_exported(with_norm: bool) -> None:
    # The function in float64; that of float32 has no operator of oneDNN when exported.
    model = pair(act="silu")
    model = model if with_norm else Pair(model.conv, None, "silu")
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        added = torch.randn_like(model(x))
        assert "mkldnn" not in str(torch.export.export(model, (x, added)).graph)
        model, x, added = model.double(), x.double(), added.double()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x, added), model.plain(x, added), name="y")
        model.conv.weight.mul_(2)  # in the graph: seen there too
        assert_same(compiled(x, added), model.plain(x, added), name="y of other weights")
        program = torch.export.export(model, (x, added))
        assert_same(program.module()(x, added), model.plain(x, added), name="exported")
