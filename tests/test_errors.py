"""What a user gets wrong: TypeError or ValueError that names the argument, expected and got."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastcnn import _C, functional
from fastcnn._version_check import check_torch
from fastcnn.functional import ConvBnActBlock, ConvBnActStep, MaxPool
from fastcnn.models import resnet18
from fastcnn.nn import BatchNormAct2d, Block, Upsample, conv_bn_act, conv_bn_act_blocks

X = torch.randn(2, 3, 4, 4)
BIG = torch.randn(2, 5, 8, 8)
HALF = X.bfloat16()
C3, C4 = torch.ones(3), torch.ones(4)
NAN = float("nan")

# What replaces a good argument of batch_norm_act, the error, and what its message names.
BATCH_NORM_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, r"input: expected a Tensor, got list"),
    ({"input": X[0]}, ValueError, r"input: expected 4 dimensions .*, got 3: \[3, 4, 4\]"),
    ({"input": X[None]}, ValueError, r"input: expected 4 dimensions .*, got 5"),
    ({"input": X.long()}, TypeError, r"input: expected float32, .*, got torch.int64"),
    # Layouts that only a copy would bring in order: the message says how to make it.
    ({"input": X.mT}, ValueError, r"input: expected a dense .* strides \[48, 16, 1, 4\]; call"),
    ({"input": X[..., ::2]}, ValueError, r"input: expected a dense NCHW or channels_last"),
    ({"input": torch.ones(1).expand(2, 3, 4, 4)}, ValueError, r"strides \[0, 0, 0, 0\]"),
    ({"input": C3[None, :, None, None]}, ValueError, r"more than 1 value .*\[1, 3, 1, 1\]"),
    ({"weight": C4}, ValueError, r"weight: expected 3 numbers, .* got sizes \[4\]"),
    ({"bias": C3[None]}, ValueError, r"bias: expected 3 numbers, .* got sizes \[1, 3\]"),
    ({"running_mean": C4}, ValueError, r"running_mean: expected 3 numbers"),
    ({"weight": 1.0}, TypeError, r"weight: expected a Tensor, got float"),
    ({"weight": C3.double()}, TypeError, r"expected torch.float32 beside .*float32, got .*float64"),
    # Half parameters beside float32 images would lose digits unnoticed.
    ({"running_var": C3.half()}, TypeError, r"running_var: expected torch.float32 .*float16"),
    ({"input": HALF, "bias": C3.half()}, TypeError, r"bias: expected torch.bfloat16 or .*float32"),
    ({"weight": C3.to("meta")}, ValueError, r"weight: expected device cpu, got meta"),
    ({"running_var": None}, ValueError, r"running_var: expected a Tensor as its partner"),
    ({"running_mean": None}, ValueError, r"running_mean: expected a Tensor as its partner"),
    (
        {"running_mean": None, "running_var": None, "training": False}, ValueError,
        r"running_mean: expected a Tensor where training=False, got None",
    ),
    ({"residual": 0}, TypeError, r"residual: expected a Tensor, got int"),
    ({"residual": X[:1]}, ValueError, r"residual: expected sizes \[2, 3, 4, 4\], got \[1, 3, 4, 4"),
    ({"residual": HALF}, TypeError, r"residual: expected torch.float32 .*, got torch.bfloat16"),
    ({"residual": X.to("meta")}, ValueError, r"residual: expected device cpu, got meta"),
    (
        {"residual": X.contiguous(memory_format=torch.channels_last)}, ValueError,
        r"residual: expected the input's memory format torch.contiguous_format, got strides",
    ),
    # Updated in place: a copy of a strided vector would lose the update.
    ({"running_mean": torch.ones(6)[::2]}, ValueError, r"running_mean: expected a dense .*\(2,\)"),
    ({"momentum": None}, TypeError, r"momentum: expected a number, got NoneType"),
    ({"momentum": -0.1}, ValueError, r"momentum: expected a number from 0 to 1, got -0.1"),
    ({"momentum": NAN}, ValueError, r"momentum: expected a number from 0 to 1, got nan"),
    ({"eps": "small"}, TypeError, r"eps: expected a number, got str"),
    ({"eps": 0.0}, ValueError, r"eps: expected a number above 0, got 0.0"),
    ({"eps": NAN}, ValueError, r"eps: expected a number above 0, got nan"),
    ({"sync": 1}, TypeError, r"sync: expected a bool, got int"),
    ({"act": "swish"}, ValueError, r"act: expected one of none, relu, .*, hardswish, got 'swish'"),
    ({"act": None}, ValueError, r"act: expected one of none, relu, .*, hardswish, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), BATCH_NORM_ERRORS)
def test_batch_norm_act(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"input": X, "running_mean": C3, "running_var": C3, "weight": C3, "bias": C3}
    with pytest.raises(error, match=f"^batch_norm_act: .*{message}"):
        functional.batch_norm_act(**{**good, "training": True, **bad})


# What replaces a good argument of dropout.
DROPOUT_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, r"input: expected a Tensor, got list"),
    ({"input": X.long()}, TypeError, r"input: expected float32, .*, got torch.int64"),
    ({"input": X.mT}, ValueError, r"input: expected a dense NCHW or channels_last .*; call"),
    ({"input": X[0].mT}, ValueError, r"input: expected a contiguous tensor.*\(\) first"),
    ({"input": C3, "per_channel": True}, ValueError, r"input: expected at least 3 .*got \[3\]"),
    ({"p": 1.5}, ValueError, r"p: expected a probability from 0 to 1, got 1.5"),
    ({"p": -0.1}, ValueError, r"p: expected a probability from 0 to 1, got -0.1"),
    ({"p": float("nan")}, ValueError, r"p: expected a probability from 0 to 1, got nan"),
    ({"p": "half"}, TypeError, r"p: expected a number, got str"),
    ({"residual": X[:1]}, ValueError, r"residual: expected sizes \[2, 3, 4, 4\], got \[1, 3, 4, 4"),
    ({"residual": HALF}, TypeError, r"residual: expected torch.float32 .*, got torch.bfloat16"),
    ({"input": C3, "residual": X}, ValueError, r"residual: expected sizes \[3\], got \[2, 3, 4"),
    ({"generator": 5}, TypeError, r"generator: expected a torch.Generator, got int"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("bad", "error", "message"), DROPOUT_ERRORS)
def test_dropout(bad: dict[str, Any], error: type[Exception], message: str, training: bool) -> None:
    # In evaluation too: else a mistake would wait for the first training step.
    with pytest.raises(error, match=f"^dropout: .*{message}"):
        functional.dropout(**{"input": X, "training": training, **bad})


STEP = ConvBnActStep(torch.randn(4, 3, 3, 3), C4, 1, 1, 1, 1, C4, C4, C4, C4, True)
SECOND = STEP._replace(weight=torch.randn(4, 4, 1, 1), padding=0)

# What replaces something in the second step of a good chain.
STEP_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": None}, TypeError, r"weight: expected a Tensor, got NoneType"),
    ({"weight": C4}, ValueError, r"weight: expected 4 dimensions .*, got \[4\]"),
    ({"weight": torch.ones(4, 3, 1, 1)}, ValueError, r"expected 4 input channels, got 3 \(3 for"),
    ({"weight": SECOND.weight.half()}, TypeError, r"weight: expected torch.float32 .*float16"),
    ({"weight": torch.ones(4, 4, 5, 1)}, ValueError, r"weight: expected a kernel that fits into"),
    ({"groups": 0}, ValueError, r"groups: expected at least 1, got 0"),
    ({"weight": torch.ones(3, 2, 1, 1), "groups": 2}, ValueError, r"groups: expected a divisor"),
    ({"conv_bias": C3}, ValueError, r"conv_bias: expected 4 numbers, got \[3\]"),
    ({"conv_bias": C4.to("meta")}, ValueError, r"conv_bias: expected device cpu, got meta"),
    ({"stride": 0}, ValueError, r"stride 0"),
    ({"dilation": 0}, ValueError, r"dilation 0"),
    ({"padding": -1}, ValueError, r"padding -1"),
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
    ({"pool": MaxPool(2.0, 2)}, ValueError, r"pool.kernel_size: expected a whole number or a pair"),
    ({"pool": MaxPool(2, (1, 1, 1))}, ValueError, r"pool.stride: .* or a pair .*, got \(1, 1, 1\)"),
    ({"pool": 2}, TypeError, r"pool: expected None or a MaxPool, got int"),
    ({"momentum": 1.5}, ValueError, r"momentum: expected a number from 0 to 1, got 1.5"),
    ({"eps": -1e-5}, ValueError, r"eps: expected a number above 0, got -1e-05"),
    ({"sync": None}, TypeError, r"sync: expected a bool, got NoneType"),
    ({"stride": None}, ValueError, r"stride: expected a whole number or a pair of them, got None"),
    ({"padding": "same"}, ValueError, r"padding: expected a whole number or a pair .*, got 'same'"),
]  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("bad", "error", "message"), STEP_ERRORS)
def test_a_step_of_conv_bn_act(
    bad: dict[str, Any], error: type[Exception], message: str, autocast: bool
) -> None:
    # One image, so that stride 4 leaves a single value a channel. Casting must not get in the way.
    if autocast and "weight: expected torch.float32" in message:
        return  # cast to the autocast dtype like any other
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(error, match=f"^conv_bn_act: step 1: .*{message}"),
    ):
        functional.conv_bn_act(X[:1], [STEP, SECOND._replace(**bad)])


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
        [ConvBnActBlock([STEP], [STEP._replace(stride=2)])], ValueError,
        r"shortcut: expected sizes \[2, 4, 4, 4\] as the steps give, got \[2, 4, 2, 2\]",
    ),
    (
        [ConvBnActBlock([STEP], [SECOND])], ValueError,
        r"shortcut: step 0: weight: expected 3 input channels, got 4",
    ),
    (
        [ConvBnActBlock([STEP]), ConvBnActBlock([STEP])], ValueError,
        r"block 1: step 0: weight: expected 4 input channels, got 3",
    ),
    ([ConvBnActBlock([POOLED], [POOLED])], ValueError, r"pool: expected None in the last step of"),
    ([ConvBnActBlock([C4])], TypeError, r"step 0: expected a ConvBnActStep, got Tensor"),
    ([[STEP]], TypeError, r"blocks: expected ConvBnActBlocks, got list"),
    ([ConvBnActBlock([STEP], 0)], TypeError, r"shortcut: expected a tuple or list .*, got int"),
    ([ConvBnActBlock(STEP)], TypeError, r"steps: expected a tuple or list of .*, got ConvBn"),
]  # fmt: skip


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
        ValueError, match=r"conv_bn_act: memory: .* default, low, lowest, got 'high'"
    ):
        functional.conv_bn_act(X, [STEP], memory="high")
    with pytest.raises(ValueError, match=r"ResNet: memory: .* default, low, lowest, got None"):
        resnet18(memory=None)
    with pytest.raises(ValueError, match=r"pool: expected None in the last step of a block with a"):
        functional.conv_bn_act(X, [POOLED], residual=torch.randn(2, 4, 4, 4))
    for kwargs in ({"dilation": 2}, {"ceil_mode": True}, {"return_indices": True}):
        step = (nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.MaxPool2d(2, **kwargs))
        with pytest.raises(ValueError, match="step 0: expected a MaxPool2d without dilation"):
            conv_bn_act(X, [step])


# What replaces a good argument of interpolate.
INTERPOLATE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": None}, TypeError, r"input: expected a Tensor, got NoneType"),
    ({"input": X[0]}, ValueError, r"input: expected 4 dimensions .*, got 3"),
    ({"input": X.mT}, ValueError, r"input: expected a dense NCHW or channels_last"),
    ({"input": X[..., :0]}, ValueError, r"input: expected images of at least 1 pixel"),
    ({"size": 8}, ValueError, r"size, scale_factor: expected exactly one of the two, got both"),
    ({"scale_factor": None}, ValueError, r"size, scale_factor: expected exactly .*, got neither"),
    ({"scale_factor": (2, 2, 2)}, ValueError, r"scale_factor: expected a number or a pair"),
    ({"scale_factor": "2"}, TypeError, r"scale_factor: expected a number or a pair .* got '2'"),
    ({"scale_factor": 0.1}, ValueError, r"scale_factor=0.1: expected an output of at least 1x1"),
    ({"scale_factor": float("nan")}, ValueError, r"expected an output of at least 1x1"),
    ({"scale_factor": 1e30}, ValueError, r"scale_factor=1e\+30: .* at most 2147483647 pixels"),
    ({"scale_factor": None, "size": (8, 2**40)}, ValueError, r"size=\(8, 1099.*: .* got 8x1099"),
    ({"scale_factor": None, "size": (8, 8, 8)}, ValueError, r"size: expected an integer or a pair"),
    ({"scale_factor": None, "size": 8.5}, TypeError, r"size: expected an integer .* got 8.5"),
    ({"scale_factor": None, "size": (0, 8)}, ValueError, r"size=\(0, 8\): .* got 0x8"),
    (
        {"scale_factor": None, "size": 8, "recompute_scale_factor": True}, ValueError,
        r"recompute_scale_factor: expected a scale_factor .*, got size=8",
    ),
    ({"mode": "bicubic"}, ValueError, r"mode: expected one of nearest, nearest-exact, bilinear,"),
    ({"mode": "nearest", "align_corners": False}, ValueError, r"align_corners: expected None"),
    ({"antialias": True}, ValueError, r"antialias: expected False"),
    ({"concat": 1}, TypeError, r"concat: expected a Tensor, got int"),
    ({"concat": X}, ValueError, r"concat: expected sizes \[2, any, 8, 8\], got \[2, 3, 4, 4\]"),
    ({"concat": BIG[:1]}, ValueError, r"concat: expected sizes \[2, any, 8, 8\]"),
    ({"concat": BIG.half()}, TypeError, r"concat: expected torch.float32 as .*, got torch.float16"),
    ({"concat": BIG.to("meta")}, ValueError, r"concat: expected device cpu, got meta"),
    ({"concat": BIG.mT}, ValueError, r"concat: expected a dense NCHW or channels_last"),
    (
        {"concat": BIG.contiguous(memory_format=torch.channels_last)}, ValueError,
        r"concat: expected the input's memory format torch.contiguous_format, got strides",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "message"), INTERPOLATE_ERRORS)
def test_interpolate(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"input": X, "scale_factor": 2, "mode": "bilinear"}
    with pytest.raises(error, match=f"^interpolate: .*{message}"):
        functional.interpolate(**{**good, **bad})


def test_an_upsampling_mode_that_a_module_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"Upsample: mode: expected one of .*, got 'area'"):
        Upsample(scale_factor=2, mode="area")


@pytest.mark.parametrize("kwargs", [{"padding": "same"}, {"padding_mode": "reflect", "padding": 1}])
def test_convolutions_that_the_chain_does_not_run(kwargs: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="step 0: expected padding numbers with padding_mode='zero"
    ):
        conv_bn_act(X, [(nn.Conv2d(3, 4, 3, **kwargs), BatchNormAct2d(4))])


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
            ValueError, match=r"^conv_bn_act: step 0: expected a .* without forward"
        ):
            conv_bn_act(X, [step])
    prune.remove(steps[0][0], "weight")
    assert conv_bn_act(X, [steps[0]]).shape == (2, 4, 2, 2)


def test_an_activation_that_a_module_does_not_know() -> None:
    # At construction, not at the first batch.
    with pytest.raises(ValueError, match=r"BatchNormAct2d: act: expected one of .*, got 'tanh'"):
        BatchNormAct2d(3, act="tanh")


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "nightly"])
def test_torch_too_old(version: str) -> None:
    with pytest.raises(ImportError, match=r"fastcnn 0.1 needs torch 2.11 or later, found torch"):
        check_torch(version, "0.1")


def test_torch_new_enough() -> None:
    # By numbers, not by text: "2.9" > "2.11" and "10.0" < "2.11" as strings.
    for version in ("2.11.0", "2.13.0+cpu", "3.0.0a0+git1234", "10.0.1"):
        check_torch(version, "0.1")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real,90", 80, True),  # its own machine code
        ("80-real,90", 86, True),  # machine code of a lower minor version
        ("80-real,90", 75, False),  # older than everything there is
        ("80-real,90", 100, True),  # from PTX of 90
        ("80-real,90-real", 100, False),  # no PTX
        ("86-real", 80, False),  # machine code of a higher minor version
        ("90-virtual", 90, True),  # PTX alone serves its own version
        ("90-virtual", 89, False),  # and none before
        ("100-real", 120, False),  # another major version
    ],
)
def test_code_for_the_card_that_is_there(archs: str, capability: int, runs: bool) -> None:
    missing = _C.missing_cuda_code(archs, capability)
    if runs:
        assert missing == ""
    else:
        for part in (f"for {archs} ", f"got sm_{capability}", f"FASTCNN_CUDA_ARCHS={capability}"):
            assert part in missing


def test_an_unknown_cpu_capability() -> None:
    code = "import fastcnn, torch; fastcnn.nn.BatchNormAct2d(3)(torch.ones(2, 3, 4, 4))"
    env = {**os.environ, "FASTCNN_CPU_CAPABILITY": "avx3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1, "an exception, not a crash"
    assert "FASTCNN_CPU_CAPABILITY: expected baseline, avx2 or avx512, got avx3" in done.stderr
