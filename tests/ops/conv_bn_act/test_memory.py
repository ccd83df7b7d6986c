"""What conv_bn_act saves for backward: counted in bytes, in eager and under torch.compile.

The expected number is a formula in the sizes of the convolutions' outputs, which hooks on the eager
baseline's convolutions tell.
"""

import itertools

import pytest
import torch
from support.chains import (
    LEVELS,
    SHORTCUTS,
    Chain,
    Operators,
    Stage,
    conv_bn,
    expected_bytes,
    stage,
    state,
)
from support.shapes import LAYOUTS
from torch import Tensor, nn

from fastcnn.lab import saved_for_backward
from fastcnn.nn import Block
from fastcnn.ops.conv2d import float32_products
from fastcnn.ops.conv2d.float32_products import Least

# Dynamo makes an instance of the autograd.Function, against PyTorch's own advice; inductor imports
# parts of torch.jit.
pytorchs_own_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# One of each way to know the derivative behind a residual: without anything, from y, from z.
ACTS = ["none", "relu", "silu"]


def images(*sizes: int, layout: str = "channels_last") -> Tensor:
    return torch.randn(sizes).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", LEVELS)
def test_stages(memory: str, layout: str) -> None:
    x = images(2, 4, 9, 8, layout=layout).requires_grad_()
    shortcuts = [*((s,) for s in SHORTCUTS if s != "identity")]
    shortcuts += [("projection", "identity", "two steps", last) for last in SHORTCUTS]
    for names, act, training in itertools.product(shortcuts, ACTS, [True, False]):
        model = stage(*names, act=act, memory=memory).train(training)
        model = model.to(memory_format=LAYOUTS[layout])
        kept = saved_for_backward(lambda m=model: m(x), exclude=state(model))
        assert kept == expected_bytes(model, x), f"{names} {act} training={training}"


@pytest.mark.parametrize("memory", LEVELS)
def test_a_tensor_as_residual(memory: str) -> None:
    x = images(2, 4, 9, 8)
    for act, training in itertools.product(ACTS, [True, False]):
        model = stage("none", act=act, memory=memory).train(training)
        added = images(2, 8, 5, 4)
        kept = saved_for_backward(lambda m=model, r=added: m(x, r), exclude=state(model))
        assert kept == expected_bytes(model, x, added), f"{act} training={training}"


@pytest.mark.parametrize("memory", LEVELS)
def test_half_images_take_half_the_bytes(memory: str) -> None:
    x = images(2, 4, 9, 8).bfloat16()
    model = stage("projection", "identity", memory=memory)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_for_backward(lambda: model(x), exclude=state(model))
    assert kept == expected_bytes_in_autocast(model, x)


def expected_bytes_in_autocast(model: Stage, x: Tensor) -> int:
    """With the weights' casts, which eager keeps as well."""
    statistics = sum(2 * 4 * bn.num_features for bn in model.bns)
    float_images = expected_bytes(model, x.float()) - statistics
    casts = sum(2 * p.numel() for conv in model.convs for p in conv.parameters())
    return float_images // 2 + statistics + casts


@pytest.mark.parametrize("memory", LEVELS)
def test_pooling(memory: str) -> None:
    x = images(2, 4, 9, 8)
    pooled = (*conv_bn(4, 6), nn.MaxPool2d(3, 2, 1))
    for blocks in ([Block([pooled])], [Block([pooled, conv_bn(6, 8, 3)])]):
        model = Stage(*blocks, memory=memory)
        kept = saved_for_backward(lambda m=model: m(x), exclude=state(model))
        assert kept == expected_bytes(model, x)


@pytest.mark.parametrize("act", ACTS)
def test_full_recomputes_nothing(act: str) -> None:
    pooled = Block([(*conv_bn(4, 4, 1, act), nn.MaxPool2d(3, 2, 1)), conv_bn(4, 4, 3, act)])
    blocks = [pooled, *stage("projection", "identity", "two steps", act=act).blocks]
    for memory, nothing in (("full", True), ("default", False)):
        y = Stage(*blocks, memory=memory)(images(2, 4, 17, 16))
        with Operators() as operators:
            y.sum().backward()
        again = (torch.ops.fastcnn.batch_norm_act_apply, torch.ops.aten.max_pool2d_with_indices)
        assert (sum(operators.calls[op] for op in again) == 0) is nothing, memory
        assert operators.calls[torch.ops.aten.convolution] == 0


def test_auto_is_full_on_the_cpu() -> None:
    x, blocks = images(2, 4, 9, 8), stage("projection", "identity").blocks
    found = {}
    for memory in ("auto", "full", "default"):
        model = Stage(*blocks, memory=memory)
        found[memory] = saved_for_backward(lambda m=model: m(x), exclude=state(model))
    assert found["auto"] == found["full"] > found["default"]


def test_what_eager_keeps_for_comparison() -> None:
    # The formula's other side: two steps of eager PyTorch save x, both convolutions, both outputs.
    x = images(2, 4, 9, 8)
    chain = Chain(conv_bn(4, 8, 3), conv_bn(8, 8, 3))
    sizes = x.nbytes + 4 * 2 * (8 * 9 * 8) * 4
    statistics = 2 * 2 * 8 * 4
    for fused, saved in ((True, 2 * 2 * 8 * 9 * 8 * 4), (False, 0)):
        chain.fused = fused
        kept = saved_for_backward(lambda: chain(x), exclude=state(chain))
        assert kept == sizes + statistics - saved


def mixed_stage(memory: str) -> tuple[Stage, Tensor]:
    """Projections, frozen and trained batch norms, a pooling: all places where the compiler could
    take what backward computes again for what forward has computed."""
    model = stage("projection", "two steps", memory=memory)
    pooled = Block([(*conv_bn(4, 4, 1), nn.MaxPool2d(3, 2, 1)), conv_bn(4, 4, 3)])
    model = Stage(pooled, *model.blocks, memory=memory).to(memory_format=torch.channels_last)
    for bn in model.bns[::2]:
        bn.eval()
    return model, images(2, 4, 17, 16).requires_grad_()


def gradients(model: Stage, x: Tensor, run: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(run(x).square().sum(), [x, *model.parameters()]))


@pytorchs_own_warnings
@pytest.mark.parametrize("memory", LEVELS)
def test_compiled(memory: str) -> None:
    # aot_eager goes through AOTAutograd's partitioner, which decides what is kept, and then runs
    # the same operators: the same bits.
    model, x = mixed_stage(memory)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(model, x, compiled), gradients(model, x, model), strict=True):
        assert torch.equal(a, b)
    kept = saved_for_backward(lambda: compiled(x), exclude=state(model))
    assert kept == expected_bytes(model, x)


@pytorchs_own_warnings
@pytest.mark.parametrize("in_float32", [False, True])
def test_compiled_in_bfloat16(in_float32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Under autocast, with channels enough for the weight gradient's own kernel.
    least = {torch.bfloat16: Least(0, 0)} if in_float32 else {}
    monkeypatch.setattr(float32_products, "LEAST", least)
    steps = [conv_bn(32, 64), conv_bn(64, 64, 3), conv_bn(64, 128)]
    model = Stage(Block(steps, [conv_bn(32, 128, act="none")]), memory="lowest")
    model = model.to(memory_format=torch.channels_last)
    x = images(2, 32, 9, 8).bfloat16().requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        pairs = zip(gradients(model, x, compiled), gradients(model, x, model), strict=True)
        kept = saved_for_backward(lambda: compiled(x), exclude=state(model))
    for a, b in pairs:
        assert torch.equal(a, b)
    expected = expected_bytes_in_autocast(model, x)
    # Of a weight that is read in float32 the compiler may keep that or nothing, and no cast.
    assert kept <= expected if in_float32 else kept == expected


@pytest.mark.slow
@pytorchs_own_warnings
def test_compiled_by_inductor() -> None:
    # Which has passes of its own before the partitioner, and saves running statistics themselves
    # where eager saves copies.
    model, x = mixed_stage("lowest")
    compiled = torch.compile(model, fullgraph=True)
    kept = saved_for_backward(lambda: compiled(x), exclude=state(model))
    copies = sum(2 * 4 * bn.num_features for bn in model.bns if not bn.training)
    assert kept == expected_bytes(model, x) - copies
