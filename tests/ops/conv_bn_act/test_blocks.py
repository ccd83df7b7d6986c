"""Blocks and memory levels of conv_bn_act: values and gradients.

Against torch.nn modules in float64, and the levels against each other bit for bit: what backward
recomputes must be what forward had, also where a rounding decides about a derivative.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.activations import ACTS
from support.chains import (
    LEVELS,
    SHORTCUTS,
    Chain,
    Stage,
    assert_same_results,
    baseline,
    check_float64,
    conv_bn,
    results,
    stage,
)
from support.shapes import LAYOUTS
from support.tolerance import assert_same
from torch import nn
from torch.autograd import gradcheck

from fastcnn import reference
from fastcnn.functional import ConvBnActBlock, ConvBnActStep, MaxPool, conv_bn_act_blocks
from fastcnn.nn import BatchNormAct2d, Block


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_one_block(shortcut: str, act: str) -> None:
    # "low" is "default" for a single block.
    for memory, training in itertools.product(["default", "lowest"], [True, False]):
        c_in = 8 if shortcut == "identity" else 4
        block = stage(shortcut, act=act, c_in=c_in, memory=memory).train(training)
        check_float64(block, (2, c_in, 5, 6), layout="channels_last" if training else "nchw")


@pytest.mark.parametrize("memory", LEVELS)
def test_an_input_of_both_layouts(memory: str) -> None:
    # One channel is dense in both orders: the projection's 1x1 weight leaves it at that, and its
    # convolution chooses NCHW; the other's weight is channels_last. ReLU keeps y for backward, SiLU
    # has the shortcut recomputed.
    for act, training in itertools.product(["relu", "silu"], [True, False]):
        block = Block([conv_bn(1, 2, 3, act)], [conv_bn(1, 2, 1, "none")])
        model = Stage(block, Block([conv_bn(2, 2, 1, act)], ()), memory=memory).train(training)
        check_float64(model, (2, 1, 3, 4), layout="channels_last")
        with torch.no_grad():
            x = torch.randn(2, 1, 3, 4).contiguous(memory_format=torch.channels_last)
            model = model.float().to(memory_format=torch.channels_last)
            assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("last", SHORTCUTS)
def test_blocks_whose_inputs_are_recomputed(last: str, act: str) -> None:
    # Each kind of block as the first of a pair and as the last: what the derivative of a block's
    # last activation needs comes from forward there, and from the recomputation elsewhere.
    for first, training in itertools.product(("none", "projection", "two steps"), [True, False]):
        blocks = stage(first, "identity", last, act=act, memory="low").train(training)
        check_float64(blocks, (2, 4, 5, 6), layout="nchw" if training else "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", LEVELS)
def test_a_stage(memory: str, layout: str) -> None:
    for x_needs_grad in (True, False):
        blocks = stage("projection", "identity", "none", "two steps", "identity", memory=memory)
        check_float64(blocks, layout=layout, x_needs_grad=x_needs_grad)


@pytest.mark.parametrize("act", ACTS)
def test_a_tensor_as_residual_in_lowest(act: str) -> None:
    steps = stage("none", act=act).blocks[0].steps
    for training in (True, False):
        chain = Chain(*steps, memory="lowest").train(training)
        check_float64(chain, residual=True, layout="channels_last")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_agree_bit_for_bit(layout: str, dtype: torch.dtype) -> None:
    for act, training in [*((act, True) for act in ACTS), ("relu", False), ("silu", False)]:
        model = stage("projection", "identity", "none", "two steps", act=act).train(training)
        model = model.to(dtype=dtype, memory_format=LAYOUTS[layout])
        x = torch.randn(2, 4, 9, 8).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        found = {}
        for memory in LEVELS:
            level = copy.deepcopy(model)
            level.memory = memory
            found[memory] = results(level, x, None)
        for memory, (name, t) in itertools.product(LEVELS, found["default"].items()):
            if t is not None:
                assert torch.equal(found[memory][name], t), f"{memory}, {act}: {name}"


POOLS = {
    "ResNet's": nn.MaxPool2d(3, 2, 1),
    "VGG's": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, 1, (0, 1)),  # a pixel may be the largest of many windows
}


@pytest.mark.parametrize("memory", LEVELS)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_pooling(pool: nn.MaxPool2d, memory: str) -> None:
    # As the last step; behind a step that is recomputed, before one that is; at the end of a
    # shortcut; at the end of a block whose output is recomputed.
    for act, training in itertools.product(ACTS, [True, False]):
        pooled = [(*conv_bn(4, 6, 1, act), pool)]
        for blocks in (
            [Block(pooled)],
            [Block([*pooled, conv_bn(6, 6, 3, act)])],
            [Block([*pooled, conv_bn(6, 8, 1, act)], pooled_shortcut(pool, act))],
            [Block(pooled), Block([conv_bn(6, 6, 3, act)], ()), Block([conv_bn(6, 6, 3, act)])],
        ):
            check_float64(Stage(*blocks, memory=memory).train(training), (2, 4, 7, 6))


def pooled_shortcut(pool: nn.MaxPool2d, act: str) -> list[Any]:
    return [(*conv_bn(4, 8, 1, act), pool)]


@pytest.mark.parametrize("memory", LEVELS)
def test_pooling_of_windows_with_ties(memory: str) -> None:
    # Images of three values, as after relu and quantisation: every window has its largest value
    # several times, and the gradient goes where max_pool2d sends it.
    x = torch.randint(-1, 2, (3, 1, 9, 8)).double()
    for gamma in (1.0, -1.0):
        steps = (*conv_bn(1, 1), POOLS["ResNet's"]), conv_bn(1, 2, 3)
        chain = Chain(*steps, memory=memory).double()
        chain.bns[0].weight.data.fill_(gamma)
        expected = results(baseline(chain), x, None)
        assert expected["dx"].abs().max() > 1
        assert_same_results(results(chain, x, None), expected)


@pytest.mark.parametrize("memory", LEVELS)
def test_blocks_that_share_parameters(memory: str) -> None:
    # A block that runs three times, as in recurrent networks: gradients and batches add up.
    block = stage("identity", c_in=6).blocks[0]
    model = Stage(block, block, block, memory=memory)
    found = check_float64(model, (2, 6, 5, 6))
    assert found["bns.0.num_batches_tracked"] == 3


@pytest.mark.parametrize("memory", LEVELS)
def test_backward_twice(memory: str) -> None:
    # Backward drops each tensor after its last use; what autograd is told to retain must stay.
    model = stage("projection", "identity", "two steps", memory=memory).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    y = model(x).square().sum()
    once = torch.autograd.grad(y, leaves, retain_graph=True)
    twice = torch.autograd.grad(y, leaves)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, leaves)


@pytest.mark.parametrize("memory", LEVELS)
def test_one_output_used_twice(memory: str) -> None:
    # Its gradient is a sum: backward runs once. And one input in two calls: its gradients add up.
    model = stage("projection", "identity", memory=memory).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    found = []
    for run in (model, baseline(model)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y.square().sum() + (run(leaf) * y.detach()).sum() + y.sum()).backward()
        found.append(leaf.grad)
    assert_same(*found, name="dx")


@pytest.mark.parametrize("memory", LEVELS)
def test_batch_norms_of_both_modes(memory: str) -> None:
    # Frozen ones normalise with running statistics inside training, and get no update.
    for frozen in itertools.combinations(range(7), 3):  # a projection's among them
        model = stage("projection", "identity", memory=memory)
        for i in frozen:
            model.bns[i].eval()
        before = model.bns[frozen[0]].running_mean.double()
        after = check_float64(model, (2, 4, 5, 6))[f"bns.{frozen[0]}.running_mean"]
        assert torch.equal(before, after)


def plain_step(c_in: int, c_out: int, size: int = 1, **kwargs: Any) -> ConvBnActStep:
    """A step of plain tensors, all of them there, gamma of both signs."""
    shape = (c_out, c_in // kwargs.get("groups", 1), size, size)
    arguments: dict[str, Any] = {
        "stride": 1, "padding": size // 2, "dilation": 1, "groups": 1, "training": True, **kwargs
    }  # fmt: skip
    tensors = {"weight": torch.randn(shape)} | {
        name: torch.randn(c_out)
        for name in ("conv_bias", "bn_weight", "bn_bias", "running_mean", "running_var")
    }
    tensors["running_var"] = tensors["running_var"].exp()
    return ConvBnActStep(**{k: t.double() for k, t in tensors.items()}, **arguments)


# Everything that a functional block can be, on images of 4 channels and 9x8 pixels.
PLAIN_BLOCKS: dict[str, Callable[[], ConvBnActBlock]] = {
    "a step": lambda: ConvBnActBlock([plain_step(4, 6, 3, stride=2)]),
    "evaluation": lambda: ConvBnActBlock([plain_step(4, 6, 3, training=False, eps=0.1)]),
    "projection": lambda: ConvBnActBlock(
        [plain_step(4, 6, 3, stride=2, act="silu"), plain_step(6, 8)],
        [plain_step(4, 8, stride=(2, 2), act="none")],
    ),
    "the input": lambda: ConvBnActBlock([plain_step(4, 6), plain_step(6, 4, 3, act="gelu")], ()),
    "groups": lambda: ConvBnActBlock([plain_step(4, 8, 3, groups=2, dilation=2, padding=(2, 1))]),
    "pooling": lambda: ConvBnActBlock([plain_step(4, 6, pool=MaxPool(3, (2, 1), 1))]),
}


@pytest.mark.parametrize("memory", LEVELS)
@pytest.mark.parametrize("kind", PLAIN_BLOCKS)
def test_blocks_of_plain_tensors_against_the_reference(kind: str, memory: str) -> None:
    blocks, x = [PLAIN_BLOCKS[kind]()], torch.randn(2, 4, 9, 8, dtype=torch.float64)
    c_out = blocks[0].steps[-1].weight.shape[0]
    blocks.append(ConvBnActBlock([plain_step(c_out, c_out, 3)], ()))  # recomputes the first's
    weights = [s.weight for block in blocks for s in (*block.steps, *(block.shortcut or ()))]
    leaves = [t.requires_grad_() for t in (x, *weights)]
    found = []
    expected = reference.conv_bn_act_blocks(x, blocks)  # first: the other moves the statistics
    for y in (conv_bn_act_blocks(x, blocks, memory=memory), expected):
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        assert_same(got, want, name=kind)


def test_the_reference_against_torchs_modules() -> None:
    for training in (True, False):
        model = stage("projection", "identity", "two steps", "none").double().train(training)
        x, plain = torch.randn(2, 4, 9, 8, dtype=torch.float64), baseline(model)
        blocks = [
            ConvBnActBlock(*(part and [torchs_step(*step) for step in part] for part in block))
            for block in plain.blocks
        ]
        assert_same(reference.conv_bn_act_blocks(x, blocks), plain(x), name="y")


def torchs_step(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvBnActStep:
    return ConvBnActStep(
        conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, eps=bn.eps, act=bn.act,
    )  # fmt: skip


def test_running_statistics_of_each_step_go_to_its_own_module() -> None:
    # What "lowest" does not return must not shift the others' statistics. Once, from zeros.
    model = stage("projection", "two steps", memory="lowest")
    for bn in model.bns:
        assert isinstance(bn, BatchNormAct2d)
        bn.reset_running_stats()
    check_float64(model, (2, 4, 5, 6))


def bottlenecks(memory: str) -> Stage:
    return stage("projection", "identity", "two steps", memory=memory)


@pytest.mark.parametrize("memory", LEVELS)
def test_gradcheck(memory: str) -> None:
    # By differences of the forward itself. A smooth activation: its derivative does not jump.
    model = stage("projection", "identity", act="silu", memory=memory).double()
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = [model.convs[i].weight for i in (0, 1, 6)]
    assert gradcheck(lambda x, *_: model(x), (x, *weights), fast_mode=True)


@pytest.mark.parametrize("memory", LEVELS)
def test_autocast_is_a_cast_of_images_and_weights(memory: str) -> None:
    # To the bit what explicit casts give, with gradients in float32.
    model = bottlenecks(memory)
    cast = copy.deepcopy(model)
    for conv in cast.convs:
        conv.bfloat16()
    x = torch.randn(2, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    other = cast(x.bfloat16())
    assert torch.equal(y, other)
    for t in (y, other):
        t.sum().backward()
    for (name, p), q in zip(model.named_parameters(), cast.parameters(), strict=True):
        assert p.grad.dtype is torch.float32
        assert torch.equal(p.grad, q.grad.float()), name
