"""What a user of conv_bn_act gets wrong: errors that name the step, expected and got."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastcnn import functional
from fastcnn.functional import ConvBnActBlock, ConvBnActStep, MaxPool
from fastcnn.models import resnet18
from fastcnn.nn import BatchNormAct2d, Block, conv_bn_act, conv_bn_act_blocks

X = torch.randn(2, 3, 4, 4)
C3, C4 = torch.ones(3), torch.ones(4)

STEP = ConvBnActStep(torch.randn(4, 3, 3, 3), C4, 1, 1, 1, 1, C4, C4, C4, C4, True)
SECOND = STEP._replace(weight=torch.randn(4, 4, 1, 1), padding=0)

# What replaces something in the second step of a good chain.
STEP_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": None}, TypeError, r"weight: expected a Tensor, got NoneType"),
    ({"weight": C4}, ValueError, r"weight: expected 4 dimensions .*, got \[4\]"),
    (
        {"weight": torch.ones(4, 3, 1, 1)},
        ValueError,
        r"input: expected 3 channels .*, got 4: \[1, 4",
    ),
    ({"weight": SECOND.weight.half()}, TypeError, r"weight: expected torch.float32 .*float16"),
    ({"weight": torch.ones(4, 4, 5, 1)}, ValueError, r"weight: expected a kernel that fits into"),
    ({"groups": 0}, ValueError, r"groups: expected at least 1, got 0"),
    ({"groups": 1.0}, TypeError, r"groups: expected an integer, got float"),
    ({"stride": 1.0}, ValueError, r"stride: expected an integer or a pair of them, got 1.0"),
    ({"weight": torch.ones(3, 2, 1, 1), "groups": 2}, ValueError, r"groups: expected a divisor"),
    ({"conv_bias": C3}, ValueError, r"conv_bias: expected 4 numbers, got \[3\]"),
    ({"conv_bias": C4.to("meta")}, ValueError, r"conv_bias: expected device cpu, got meta"),
    ({"stride": 0}, ValueError, r"stride: expected integers from 1 up, got \(0, 0\)"),
    ({"dilation": (1, 0)}, ValueError, r"dilation: expected integers from 1 up, got \(1, 0\)"),
    ({"padding": -1}, ValueError, r"padding: expected integers from 0 up, got \(-1, -1\)"),
    ({"bn_weight": C3}, ValueError, r"bn_weight: expected 4 numbers"),
    ({"bn_bias": C4.double()}, TypeError, r"bn_bias: expected torch.*float32 .*float64"),
    ({"running_mean": C3}, ValueError, r"running_mean: expected 4 numbers"),
    ({"running_mean": None, "running_var": None, "training": False}, ValueError, r"training=False"),
    ({"stride": 4, "training": True}, ValueError, r"more than 1 value per channel"),
    ({"act": "GELU"}, ValueError, r"act: expected one of none, relu, .*, hardswish, got 'GELU'"),
    ({"pool": MaxPool(2, 0)}, ValueError, r"pool: expected a kernel and a stride of at least 1"),
    ({"pool": MaxPool(2, 2, -1)}, ValueError, r"pool: .* a padding of at most half the kernel"),
    ({"pool": MaxPool(2, 2, 2)}, ValueError, r"pool: .* half the kernel, got MaxPool\(kernel"),
    ({"pool": MaxPool((2, 9), 2)}, ValueError, r"pool: expected a window that fits .*\(2, 9\)"),
    ({"pool": MaxPool(2.0, 2)}, ValueError, r"pool.kernel_size: expected an integer or a pair"),
    ({"pool": MaxPool(2, (1, 1, 1))}, ValueError, r"pool.stride: .* or a pair .*, got \(1, 1, 1\)"),
    ({"pool": 2}, TypeError, r"pool: expected None or a MaxPool, got int"),
    ({"momentum": 1.5}, ValueError, r"momentum: expected a number from 0 to 1, got 1.5"),
    ({"eps": -1e-5}, ValueError, r"eps: expected a number above 0, got -1e-05"),
    ({"sync": None}, TypeError, r"sync: expected a bool, got NoneType"),
    ({"stride": None}, ValueError, r"stride: expected an integer or a pair of them, got None"),
    ({"padding": "same"}, ValueError, r"padding: expected an integer or a pair .*, got 'same'"),
]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("bad", "error", "message"), STEP_ERRORS)
def test_a_step_of_conv_bn_act(
    bad: dict[str, Any], error: type[Exception], message: str, autocast: bool
) -> None:
    # One image, so that stride 4 leaves a single value a channel. Casting must not get in the way.
    if autocast and "weight: expected torch.float32" in message:
        return  # cast to the autocast dtype like any other
    # What is known of a good step is not said of one that compares equal, nor the other way round.
    steps, bad_steps = [STEP, SECOND], [STEP, SECOND._replace(**bad)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(2):
            with pytest.raises(error, match=f"^conv_bn_act: step 1: .*{message}"):
                functional.conv_bn_act(X[:1], bad_steps)
            functional.conv_bn_act(X[:1], steps)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_conv_bn_act(autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ValueError, match="conv_bn_act: steps: expected at least one, got none"):
            functional.conv_bn_act(X, [])
        with pytest.raises(TypeError, match="conv_bn_act: input: expected a Tensor, got str"):
            functional.conv_bn_act("x", [STEP])
        with pytest.raises(
            ValueError, match=r"residual: expected sizes \[2, 4, 4, 4\], got \[2, 3"
        ):
            functional.conv_bn_act(X, [STEP], residual=X)
        with pytest.raises(
            TypeError, match="residual: expected a Tensor or a sequence of steps, got int"
        ):
            functional.conv_bn_act(X, [STEP], residual=1)


POOLED = STEP._replace(pool=MaxPool(2, 2))

BLOCKS_ERRORS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, r"blocks: expected at least one, got none"),
    ([ConvBnActBlock([])], ValueError, r"steps: expected at least one, got none"),
    ([ConvBnActBlock([STEP]), ConvBnActBlock([])], ValueError, r"block 1: steps: expected at"),
    ([ConvBnActBlock([STEP], ())], ValueError, r"shortcut: expected sizes .*\[2, 4.*got \[2, 3"),
    (
        [ConvBnActBlock([STEP], [STEP._replace(stride=2)])],
        ValueError,
        r"shortcut: expected sizes \[2, 4, 4, 4\] as the steps give, got \[2, 4, 2, 2\]",
    ),
    (
        [ConvBnActBlock([STEP], [SECOND])],
        ValueError,
        r"shortcut: step 0: input: expected 4 channels for weight .*, got 3",
    ),
    (
        [ConvBnActBlock([STEP]), ConvBnActBlock([STEP])],
        ValueError,
        r"block 1: step 0: input: expected 3 channels for weight .*, got 4",
    ),
    ([ConvBnActBlock([POOLED], [POOLED])], ValueError, r"pool: expected None in the last step of"),
    ([ConvBnActBlock([C4])], TypeError, r"step 0: expected a ConvBnActStep, got Tensor"),
    ([[STEP]], TypeError, r"blocks: expected ConvBnActBlocks, got list"),
    ([ConvBnActBlock([STEP], 0)], TypeError, r"shortcut: expected a tuple or list .*, got int"),
    ([ConvBnActBlock(STEP)], TypeError, r"steps: expected a tuple or list of .*, got ConvBn"),
]


@pytest.mark.parametrize("memory", ["low", "lowest"])
@pytest.mark.parametrize(("blocks", "error", "message"), BLOCKS_ERRORS)
def test_blocks_of_conv_bn_act(
    blocks: Any, error: type[Exception], message: str, memory: str
) -> None:
    # The number of a block is said whether blocks run in one call or one by one.
    with pytest.raises(error, match=f"^conv_bn_act: .*{message}"):
        functional.conv_bn_act_blocks(X, blocks, memory=memory)


def test_memory_levels_and_poolings_of_conv_bn_act() -> None:
    with pytest.raises(
        ValueError, match=r"conv_bn_act: memory: .* full, default, low, lowest, got 'high'"
    ):
        functional.conv_bn_act(X, [STEP], memory="high")
    with pytest.raises(
        ValueError, match=r"resnet18: memory: .* full, default, low, lowest, got None"
    ):
        resnet18(memory=None)
    with pytest.raises(ValueError, match=r"pool: expected None in the last step of a block with a"):
        functional.conv_bn_act(X, [POOLED], residual=torch.randn(2, 4, 4, 4))
    for kwargs in ({"dilation": 2}, {"ceil_mode": True}, {"return_indices": True}):
        step = (nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.MaxPool2d(2, **kwargs))
        with pytest.raises(ValueError, match="step 0: expected a MaxPool2d without dilation"):
            conv_bn_act(X, [step])


@pytest.mark.parametrize("kwargs", [{"padding": "same"}, {"padding_mode": "reflect"}])
def test_convolutions_that_the_chain_does_not_run(kwargs: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="step 0: expected padding of both sides alike with padding_mode='zero"
    ):
        conv_bn_act(X, [(nn.Conv2d(3, 4, 2, **kwargs), BatchNormAct2d(4))])


CONV, BN, POOL = nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.MaxPool2d(2)
UP = nn.ConvTranspose2d(3, 4, 3)  # a chain would run its weight as a convolution's

# Steps of modules, the error, and what its message names.
MODULE_ERRORS: list[tuple[Any, str]] = [
    ([(UP, BN)], r"step 0: expected a Conv2d, got ConvTranspose2d"),
    ([(CONV, nn.BatchNorm2d(4))], r"step 0: expected a BatchNormAct2d, got BatchNorm2d"),
    ([(CONV, BN), (CONV, BN, nn.AvgPool2d(2))], r"step 1: expected a MaxPool2d, got AvgPool2d"),
    ([(CONV, BN, None)], r"step 0: expected a MaxPool2d, got NoneType"),
    ([(CONV, BN, POOL, POOL)], r"step 0: expected modules \(conv, bn\) or .*, got 4 of them"),
    ((CONV, BN), r"step 0: expected modules \(conv, bn\) or \(conv, bn, pool\), got Conv2d"),
    (nn.Sequential(CONV, BN), r"steps: expected a sequence of steps .*, got Sequential"),
]


@pytest.mark.parametrize(("steps", "message"), MODULE_ERRORS)
def test_modules_that_are_no_step(steps: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^conv_bn_act: {message}"):
        conv_bn_act(X, steps)
    with pytest.raises(TypeError, match=f"^conv_bn_act: block 0: {message}"):
        conv_bn_act_blocks(X, [Block(steps)])
    good = [(CONV, BN)]
    shortcut = message.replace("steps:", "shortcut:")
    with pytest.raises(TypeError, match=f"^conv_bn_act: block 1: {shortcut}"):
        conv_bn_act_blocks(X, [Block(good), Block(good, steps)])
    with pytest.raises(TypeError, match=r"^conv_bn_act: block 0: expected a Block, got tuple"):
        conv_bn_act_blocks(X, [(good, steps)])


def test_modules_whose_hooks_would_not_run() -> None:
    # Pruning and the older spectral_norm compute the weight in a hook: it would stay as it was.
    watched = nn.MaxPool2d(2)
    watched.register_forward_hook(lambda module, args, y: None)
    steps: list[Any] = [
        (prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), BN),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), BN),
        (CONV, BN, watched),
    ]
    for step in steps:
        with pytest.raises(
            ValueError, match=r"^conv_bn_act: step 0: expected a .*, got .* with forward hooks"
        ):
            conv_bn_act(X, [step])
    prune.remove(steps[0][0], "weight")
    assert conv_bn_act(X, [steps[0]]).shape == (2, 4, 2, 2)
    watched = nn.Conv2d(3, 4, 3)
    watched.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="got Conv2d with backward hooks"):
        conv_bn_act(X, [(watched, BN)])


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Doubled(BatchNormAct2d):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * super().forward(x, residual)


def test_modules_whose_forward_would_not_run() -> None:
    # Weight standardisation, adapters, fake quantisation: their arithmetic would be left out.
    patched = nn.Conv2d(3, 4, 3)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for step, got in (
        ((Standardised(3, 4, 3), BN), "Standardised"),
        ((CONV, Doubled(4)), "Doubled"),
        ((patched, BN), "Conv2d"),
    ):
        with pytest.raises(ValueError, match=f"got {got} with a forward of its own"):
            conv_bn_act(X, [step])
    plain = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))  # a class, but no forward
    assert conv_bn_act(X, [(plain, BN)]).shape == (2, 4, 2, 2)
