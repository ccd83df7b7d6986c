"""The operator of Triton's convolution: as PyTorch wants operators, and what it refuses.

What a device cannot change is asked on the CPU alone.
"""

import copy
from typing import Any

import pytest
import torch
from support import triton_interpreter  # noqa: F401 (mends the interpreter)
from support.chains import Operators, Stage, results, stage
from support.device import DEVICE
from torch import Tensor
from torch.library import opcheck

from fastcnn.ops.conv2d import fused_cuda as operators
from fastcnn.ops.conv_bn_act import interface as conv_bn_act, planning

ops = torch.ops.fastcnn
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)
NONE = (None, None, None, None, 0.0)


def image(*sizes: int) -> Tensor:
    return torch.randn(sizes, device=DEVICE).contiguous(memory_format=torch.channels_last)


def norm(c: int) -> tuple[Any, ...]:
    mean, std, weight, bias = torch.randn(4, c, device=DEVICE)
    return mean, std.square() + 0.5, weight, bias, 1e-5


X, Y, WEIGHT = (2, 8, 4, 5), (2, 6, 4, 5), (6, 8, 3, 3)


@pytest.mark.gpu
def test_opcheck() -> None:
    pytest.importorskip("expecttest")  # which torch's opcheck imports
    # Schema, fake results against real ones (sizes, strides, dtypes), symbolic sizes.
    x, y, weight = image(*X), image(*Y), image(*WEIGHT)
    for statistics in (True, False):
        opcheck(ops.conv2d_fused, (x, weight, *norm(6), y, 1, statistics, *GEOMETRY))
        opcheck(ops.conv2d_fused, (x, weight, *NONE, None, 0, statistics, *GEOMETRY))


def test_opcheck_of_cudnn_s() -> None:
    # Not on a GPU, whose cuDNN has no such convolution for all sizes.
    x, y, weight, bias = image(*X).cpu(), image(*Y).cpu(), image(*WEIGHT).cpu(), torch.randn(6)
    opcheck(ops.conv2d_relu, (x, weight, bias, y, *GEOMETRY))
    opcheck(ops.conv2d_relu, (x, weight, bias, None, *GEOMETRY))


@pytest.mark.gpu
def test_a_weight_in_the_other_layout() -> None:
    # As a model has it that nobody converted: copied, since it is small; images never are.
    x, weight = image(*X), torch.randn(WEIGHT, device=DEVICE)
    rest = (*NONE, None, 0, False, *GEOMETRY)
    y, _, _ = ops.conv2d_fused(x, weight, *rest)
    same, _, _ = ops.conv2d_fused(x, weight.contiguous(memory_format=torch.channels_last), *rest)
    assert torch.equal(y, same)
    with pytest.raises(ValueError, match="x: expected 4 dimensions in channels_last"):
        ops.conv2d_fused(x.contiguous(), weight, *rest)


def test_without_a_gpu_and_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"x: expected a CUDA tensor, .* got one on cpu"):
        ops.conv2d_fused(image(*X).cpu(), image(*WEIGHT).cpu(), *NONE, None, 0, False, *GEOMETRY)


def blocks() -> Stage:
    return stage("projection", "identity", act="silu").to(DEVICE)


@pytest.mark.gpu
def test_statistics_come_with_the_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two blocks: 4 + 3 convolutions, each with a pass behind it that applies its batch norm.
    monkeypatch.setattr(conv_bn_act, "is_planned", lambda x: True)
    monkeypatch.setattr(planning, "plan_step", lambda *_: True)
    x = image(2, 4, 6, 7).requires_grad_()
    model = blocks()
    with Operators() as forward:
        y = model(x).sum()
    assert forward.calls[ops.conv2d_fused] == 7
    assert forward.calls[ops.batch_norm_act_apply] == 7
    assert not forward.calls[torch.ops.aten.convolution]
    assert not forward.calls[ops.batch_norm_act_fwd] + forward.calls[ops.batch_norm_act_stats]
    with Operators() as backward:
        y.backward()
    assert backward.calls[ops.batch_norm_act_bwd] == 7
    assert backward.calls[torch.ops.aten.convolution_backward]
    assert not backward.calls[ops.conv2d_fused]  # the convolutions' outputs were saved


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole(backend: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the planner itself, with the default plans. The same bits: the same operators.
    monkeypatch.setattr(conv_bn_act, "is_planned", lambda x: True)
    torch._dynamo.reset()
    model, x = blocks().train(training), image(2, 4, 6, 7)
    other = copy.deepcopy(model)
    expected = results(model, x, None)
    found = results(torch.compile(other, fullgraph=True, backend=backend), x, None)
    for name in ("y", "dx"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_compiled_with_symbolic_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    # dynamic=True makes numbers of modules symbolic too, an eps among them.
    monkeypatch.setattr(conv_bn_act, "is_planned", lambda x: True)
    torch._dynamo.reset()
    model = blocks()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3):
        x = image(n, 4, 6, 7)
        assert torch.equal(compiled(x), model(x))
