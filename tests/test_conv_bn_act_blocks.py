"""Blocks and memory levels of conv_bn_act: values and gradients.

Against torch.nn modules in float64, and the levels against each other bit for bit: what backward
rebuilds or runs again must be what forward had, also where a rounding decides about a kink.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from activations import ACTS
from chains import SHORTCUTS, Chain, Stage, check_float64, conv_bn, results, stage
from shapes import LAYOUTS
from torch import Tensor, nn

from fastcnn.functional import ConvBnActBlock, ConvBnActStep, conv_bn_act_blocks
from fastcnn.nn import BatchNormAct2d, Block

LEVELS = ["default", "low", "lowest"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_one_block(shortcut: str, act: str) -> None:
    # "low" is "default" for a single block.
    for memory, training in itertools.product(["default", "lowest"], [True, False]):
        c_in = 8 if shortcut == "identity" else 4
        block = stage(shortcut, act=act, c_in=c_in, memory=memory).train(training)
        check_float64(block, (2, c_in, 5, 6), layout="channels_last" if training else "nchw")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("last", SHORTCUTS)
def test_blocks_whose_inputs_are_rebuilt(last: str, act: str) -> None:
    # Each kind of block as the first of a pair and as the last: what the derivative of a block's
    # last activation needs comes from forward there, and from the rebuilding elsewhere.
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
        for memory, (name, t) in itertools.product(LEVELS[1:], found["default"].items()):
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
    # As the last step; behind a step that runs again, before one that is rebuilt; at the end of a
    # shortcut; at the end of a block whose output is rebuilt.
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
        plain = eager(chain)
        found, expected = results(chain, x, None), results(plain, x, None)
        assert expected["dx"].abs().max() > 1
        for name, want in expected.items():
            if want is not None:
                torch.testing.assert_close(found[name], want, rtol=0, atol=1e-11)


def eager(model: Stage) -> Stage:
    plain = copy.deepcopy(model)
    plain.fused = False
    return plain


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
    for run in (model, eager(model)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y.square().sum() + (run(leaf) * y.detach()).sum() + y.sum()).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


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


def test_blocks_run_on_plain_tensors() -> None:
    # The functional form, with a shortcut of its own strides: y = relu(bn(conv(x)) + bn(conv(x))).
    def step(size: int, act: str) -> ConvBnActStep:
        weight = torch.randn(6, 4, size, size, dtype=torch.float64)
        args = (None, 2, size // 2, 1, 1, None, None, None, None, True)
        return ConvBnActStep(weight, *args, act=act)

    def bn(step: ConvBnActStep, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, step.weight, None, 2, step.padding)
        return nn.functional.batch_norm(x, None, None, training=True)

    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    main, side = step(3, "relu"), step(1, "none")
    expected = (bn(main, x) + bn(side, x)).relu()
    for memory in LEVELS:
        actual = conv_bn_act_blocks(x, [ConvBnActBlock([main], [side])], memory=memory)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_running_statistics_of_each_step_go_to_its_own_module() -> None:
    # What "lowest" does not return must not shift the others' statistics. Once, from zeros.
    model = stage("projection", "two steps", memory="lowest")
    for bn in model.bns:
        assert isinstance(bn, BatchNormAct2d)
        bn.reset_running_stats()
    check_float64(model, (2, 4, 5, 6))
