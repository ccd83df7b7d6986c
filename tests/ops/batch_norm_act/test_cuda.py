"""The CUDA kernels of batch_norm_act, run by the emulator, against float64 and autograd.

Tolerances, and how z is kept off non-differentiable points: cuda_emu/batch_norm_act.py.
test_gradient_where_not_differentiable looks at those points themselves.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from cuda_emu.batch_norm_act import (
    ACT_ROUNDINGS,
    MULTI_PASS,
    ONE_PASS,
    Call,
    Options,
    Shape,
    U,
    near,
)
from cuda_emu.run import DTYPE_NUMBER, Case, run_cases
from support.activations import ACTS
from support.seeds import seeded
from torch import Tensor

from fastcnn.common.activation import ACT_NUMBER

INVALID_VALUE = 1  # cudaErrorInvalidValue
SMALL_DEVICE = {"sm_count": 3, "shared_bytes": MULTI_PASS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [pytest.param(False, id="nchw"), pytest.param(True, id="channels_last")]
# A device of 12 SMs has 24 blocks resident. With shared memory, small layers take one launch.
PATHS = [pytest.param(MULTI_PASS, id="multi_pass"), pytest.param(ONE_PASS, id="one_pass")]


def shapes(dtype: torch.dtype, channels_last: bool) -> list[Shape]:
    """n, c, h, w. A block has 256 threads of 4 vectors each, `wide` elements a vector."""
    wide = 16 // dtype.itemsize
    both = [
        (1, 1, 1, 1),  # one value: its variance is 0
        (3, 1, 1, 1),  # one channel: both layouts at once
        (2, 20, 1, 1),  # 1x1 images
        (2, 3, 5, 7),  # no whole vectors in either layout
        (1, 7, 4, 4),  # whole vectors in NCHW only
        (2, 8, 3, 3),  # and in channels_last only
        (2, 257, 1, 3),  # a prime number of columns, one more than 32 finalizing blocks have
    ]
    if channels_last:
        return [
            *both,
            *[(1, 32 * wide, 1, pixels) for pixels in (31, 32, 33)],  # 8 lanes of 4 pixels
            (2, 3 * wide, 9, 19),  # 85 lanes, a number that is odd more than once while halved
            (2, 40 * wide, 7, 5),  # two blocks of 20 columns: 12 lanes, 16 threads without one
            (2, 37 * wide, 7, 5),  # the second block has columns without a channel
            (3, wide, 10, 70),  # 256 lanes, 3 splits
            (1, 2 * wide, 64, 65),  # 33 vectors for each of 128 lanes: too long for one pass
            (2, 32 * wide, 12, 12),
            (1, 32, 12, 25),
        ]
    return [
        *both,
        *[(1, 1, 1, vectors * wide) for vectors in (1023, 1024, 1025)],  # 256 lanes of 4 vectors
        (40, 2, 1, 37 * wide),  # 2 splits, whose steps end within other images
        (5, 3, 1, 256 * wide),  # steps of whole images
        (1, 1, 2, 4100 * wide),  # 9 splits; too long for one pass
        (7, 2, 15, 41),  # 5 splits of single elements; in one pass 17 of them for each lane
        # Flat walks: planes that are no whole vectors, of half types or of all.
        (3, 16, 7, 7),  # one-pass alone, 8 (or 4) planes a block: too few rows for multi-pass
        (16, 4, 14, 14),
        (70, 8, 7, 7),  # the second block has a column beyond the last
        (40, 8, 1, 3),  # the 8 elements of a vector belong to 3 or 4 channels
        (2, 8, 15, 15),  # 225 columns, so a single lane
        (2, 8, 17, 17),  # more columns than a block has threads: elements one by one
    ]


OPTIONS: list[Options] = list(itertools.product(["none", "relu", "relu6"], *[[True, False]] * 4))
OPTIONS += [  # one switch for all activations: weight and bias need no more visits
    (act, residual, True, True, training)
    for act, residual, training in itertools.product(list(ACTS)[3:], [True, False], [True, False])
]
FULL, PLAIN = ("relu6", True, True, True, True), ("relu", False, False, False, False)


def run_both(calls: Sequence[Call], channels_last: bool) -> None:
    """Forward and backward of all calls, in one process; dresidual in every second."""
    wanted = [i % 2 == 0 for i in range(len(calls))]
    cases = [call.forward(channels_last) for call in calls]
    cases += [call.backward(channels_last, want) for call, want in zip(calls, wanted, strict=True)]
    results = run_cases("batch_norm_act", cases)
    for call, forward, backward in zip(
        calls, results[: len(calls)], results[len(calls) :], strict=True
    ):
        print(call.shape, call.act, call.training)  # pytest shows it beside a failure
        call.check_forward(forward, channels_last)
        call.check_backward(backward, channels_last)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype: torch.dtype, channels_last: bool, path: int) -> None:
    calls = [Call(dtype, shape, FULL, shared_bytes=path) for shape in shapes(dtype, channels_last)]
    # One SM and 8 tiles give one split: a thread's loop turns twice, and has a rest.
    wide = 16 // dtype.itemsize
    long_walk = (1, 8 * 32 * wide, 7, 10) if channels_last else (2, 8, 1, 1100 * wide)
    calls.append(Call(dtype, long_walk, FULL, sm_count=1, shared_bytes=path))
    run_both(calls, channels_last)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype: torch.dtype, channels_last: bool, path: int) -> None:
    wide = 16 // dtype.itemsize
    shape = (2, wide if channels_last else 3, 3, wide)  # whole vectors
    run_both([Call(dtype, shape, options, shared_bytes=path) for options in OPTIONS], channels_last)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean(dtype: torch.dtype, channels_last: bool, path: int) -> None:
    # E[x^2] - E[x]^2 would have an error of 1e8 * U = 6 in a variance of 1. The variance of bf16 is
    # that of its rounding, and 0 in some channels.
    calls = [
        Call(dtype, (5, 8, 24, 24), options, center=1e4, shared_bytes=path)
        for options in (FULL, PLAIN)
    ]
    if dtype is torch.float32:
        assert (calls[0].var_error < 0.2 * calls[0].var).all()  # the bound says something
    run_both(calls, channels_last)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels_last", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned(dtype: torch.dtype, channels_last: bool, path: int) -> None:
    # One tensor off a 16-byte address is enough: UBSan ends the run at a misaligned vector.
    wide = 16 // dtype.itemsize
    # More splits than when aligned: the workspace must be large enough for either.
    shape = (1, wide, 1, 300) if channels_last else (1, 2, 1, 512 * wide)
    call = Call(dtype, shape, FULL, shared_bytes=path)
    forward = [[name] for name in ("x", "residual", "y")]
    backward = [[name] for name in ("dy", "x", "saved", "dx", "dresidual")]
    # Parameters are floats at any address: they may be views into a larger tensor.
    channels = ["mean", "var", "weight", "bias", "dweight", "dbias"]
    cases = [call.forward(channels_last, skip=skip) for skip in [*forward, channels]]
    cases += [call.backward(channels_last, skip=skip) for skip in [*backward, channels]]
    results = run_cases("batch_norm_act", cases)
    for result in results[:4]:
        call.check_forward(result, channels_last)
    for result in results[4:]:
        call.check_backward(result, channels_last)


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_offsets_beyond_32_bits(channels_last: bool) -> None:
    # No test has memory for such tensors; the walk through them needs none.
    n, c, hw, columns, splits = (
        (1, 2**26, 2**16, 32, 64) if channels_last else (999, 2**24, 64, 1, 2)
    )
    lanes = 256 // columns
    numbers = {"n": n, "c": c, "hw": hw, "channels_last": int(channels_last), **SMALL_DEVICE}
    numbers |= {"columns": columns, "splits": splits}
    offsets = torch.empty(splits, lanes, columns, 4, dtype=torch.int64)
    cases = [
        Case("walk", numbers | {"backward": i}, outputs={"offsets": offsets}) for i in range(2)
    ]
    forward, backward = (r.tensors["offsets"] for r in run_cases("batch_norm_act", cases))
    split, lane, column, step = torch.meshgrid(*map(torch.arange, offsets.shape), indexing="ij")

    def offset_of(step: Tensor) -> Tensor:
        vector = (step * splits + split) * lanes + lane  # of the channel; 8 elements each
        if channels_last:
            return vector * c + column * 8
        return vector // (hw // 8) * c * hw + vector % (hw // 8) * 8

    length = n * hw if channels_last else n * hw // 8
    last = (length - 1 - split * lanes - lane) // (splits * lanes)
    assert torch.equal(forward, offset_of(step))
    assert torch.equal(backward, offset_of(last - step))
    assert forward.max() > 2**35


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_where_not_differentiable(dtype: torch.dtype) -> None:
    # With mean 0, variance 1 and eps 0, z is x to the last bit.
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal
    z = torch.tensor([-1, -tiny, -0.0, 0, tiny, 1, 6 - 4 * eps, 6, 6 + 4 * eps, torch.nan])
    z = torch.cat([z, torch.tensor([-3 - 4 * eps, -3, -3 + 4 * eps, 3 - 4 * eps, 3, 3 + 4 * eps])])
    z = z.to(dtype)[None, None, None]
    zero, one = torch.zeros(1), torch.ones(1)
    cases = []
    for act, with_residual in itertools.product(ACTS, [False, True]):
        call = Call(dtype, (1, 1, 1, z.numel()), (act, True, False, False, False))
        case = call.backward(channels_last=False)
        case.numbers["eps"] = 0
        case.inputs |= {"dy": torch.ones_like(z), "mean": zero, "var": one}
        x = torch.zeros_like(z) if with_residual else z  # z is y or the residual, else x
        case.inputs |= {"x": x, "saved": z if with_residual else None}
        cases.append(case)
    for case, result in zip(cases, run_cases("batch_norm_act", cases), strict=True):
        act = next(name for name in ACTS if ACT_NUMBER[name] == case.numbers["act"])
        # One by one: what PyTorch makes of a NaN depends on the place in the tensor.
        leaves = [value.clone().requires_grad_() for value in z.double().flatten()]
        expected = torch.stack(torch.autograd.grad([ACTS[act](leaf) for leaf in leaves], leaves))
        if act == "hardswish":  # where PyTorch's has no trace of the NaN
            expected[z.flatten().isnan()] = torch.nan
        got = result.tensors["dresidual"].flatten().double()
        assert torch.equal(got.isnan(), expected.isnan())
        error = eps / 2 * expected.abs() + ACT_ROUNDINGS * U
        assert ((got - expected).abs() <= error)[~expected.isnan()].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, inf, -inf, 1]).to(dtype)[None, None, None]
    expected = {
        "none": [nan, inf, -inf, 1],
        "relu": [nan, inf, 0, 1],
        "relu6": [nan, 6, 0, 1],
        "leaky_relu": [nan, inf, -inf, 1],
        "silu": [nan, inf, 0, 0.7310585786],
        "gelu": [nan, inf, 0, 0.8413447461],
        "sigmoid": [nan, 1, 0, 0.7310585786],
        "hardswish": [nan, inf, 0, 0.6666666667],
    }
    cases = []
    for act in expected:
        case = Call(dtype, (1, 1, 1, 4), (act, False, False, False, False)).forward(False)
        case.numbers["eps"] = 0
        case.inputs |= {"x": x, "mean": torch.zeros(1), "var": torch.ones(1)}
        cases.append(case)
    for act, result in zip(expected, run_cases("batch_norm_act", cases), strict=True):
        y, want = result.tensors["y"].flatten().double(), torch.tensor(expected[act]).double()
        # The reciprocal of 1 may be off.
        torch.testing.assert_close(y[:3], want[:3], rtol=2**-22, atol=0, equal_nan=True)
        error = torch.finfo(dtype).eps / 2 + ACT_ROUNDINGS * U
        assert abs(y[3] - want[3]) <= error, act


@pytest.mark.parametrize("act", ["sigmoid", "silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_of_activations(dtype: torch.dtype, act: str) -> None:
    # As csrc/cuda/activation.cuh states. With mean 0, variance 1 and eps 0, z is x to the last bit.
    z = torch.linspace(-20, 20, 4096).to(dtype)[None, None, None]
    case = Call(dtype, tuple(z.shape), (act, False, False, False, False)).forward(False)
    case.numbers["eps"] = 0
    case.inputs |= {"x": z, "mean": torch.zeros(1), "var": torch.ones(1)}
    y = run_cases("batch_norm_act", [case])[0].tensors["y"].double()
    z = z.double()
    # PyTorch's gelu in float64 loses the tail to a cancellation.
    want = z * torch.special.erfc(-z / 2**0.5) / 2 if act == "gelu" else ACTS[act](z)
    limits = torch.finfo(dtype)
    error = (2.0**-21 + z.abs() * 2.0**-23) * want.abs()
    if act == "gelu":
        small = 6e-7 if dtype is torch.float16 else 1e-7
        inside = torch.full_like(want, small).minimum(2.0**-17 * want.abs())
        error = torch.where((dtype is torch.float16) & (z.abs() < 5), inside, small)
    error += limits.eps / 2 * want.abs().clamp(min=limits.smallest_normal)
    assert ((y - want).abs() <= error).all(), ((y - want).abs() / error).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_running(dtype: torch.dtype) -> None:
    cases = []
    for c, momentum, count in [(1, 0.1, 2), (256, 0.1, 50), (257, 1.0, 3), (300, 0.25, 10**6)]:
        normal = partial(torch.randn, generator=seeded(c))
        tensors = {
            "running_mean": normal(c).to(dtype),
            "running_var": normal(c).square().to(dtype),
        }
        numbers = {
            "c": c,
            "dtype": DTYPE_NUMBER[dtype],
            "stats_dtype": 0,
            **SMALL_DEVICE,
            "momentum": momentum,
            "unbias": count / (count - 1),
        }
        new = {"mean": normal(c), "var": normal(c).square()}
        cases.append(Case("running", numbers, inputs=new, updated=tensors))
    for case, result in zip(cases, run_cases("batch_norm_act", cases), strict=True):
        assert result.error == 0
        for name, factor in (("mean", 1.0), ("var", case.numbers["unbias"])):
            old = case.updated[f"running_{name}"].double()
            new = case.inputs[name].double() * factor
            expected = torch.lerp(old, new, case.numbers["momentum"])
            # Five float32 roundings: momentum, unbias, their product, the difference, the sum.
            error = 5 * U * (old.abs() + new.abs())
            limits = torch.finfo(dtype)
            error += limits.eps / 2 * (expected.abs() + error).clamp(min=limits.smallest_normal)
            near(result, f"running_{name}", expected, error)


def test_running_statistics_of_float64_are_refused() -> None:
    # Beside float32, each way; at the operator all arguments have one type.
    cases = []
    double = {name: torch.ones(2).double() for name in ("running_mean", "running_var")}
    for dtype, stats_dtype in [(3, 0), (0, 3)]:
        numbers = {"c": 2, "dtype": dtype, "stats_dtype": stats_dtype, **SMALL_DEVICE}
        numbers |= {"momentum": 0.1, "unbias": 1}
        inputs = {"mean": double["running_mean"], "var": double["running_var"]}
        cases.append(Case("running", numbers, inputs=inputs, updated=double))
    results = run_cases("batch_norm_act", cases)
    assert [result.error for result in results] == [INVALID_VALUE] * 2


@pytest.mark.parametrize("shared_bytes", PATHS)
@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_squares_beyond_float32(channels_last: bool, shared_bytes: int) -> None:
    # Of finite values: the variance is infinite, as PyTorch's is, and y the bias.
    shapes = [(2, 8, 8, 8), (3, 4, 5, 7), (1, 3, 64, 65)]
    calls = [
        Call(torch.float32, shape, ("none", False, True, True, True), shared_bytes=shared_bytes)
        for shape in shapes
    ]
    for call in calls:
        call.x.mul_(1e30)
    cases = [call.forward(channels_last) for call in calls]
    for call, result in zip(calls, run_cases("batch_norm_act", cases), strict=True):
        assert result.tensors["var"].isposinf().all(), call.shape
        assert result.tensors["mean"].isfinite().all(), call.shape
        assert call.bias is not None
        expected = call.bias[:, None, None].expand(call.shape)
        expected = expected.permute(0, 2, 3, 1) if channels_last else expected
        assert torch.equal(result.tensors["y"], expected), call.shape
