"""batch_norm_act's CUDA kernels as synchronised statistics run them, and the choice of path.

Data, oracle and tolerances are those of cuda_emu/batch_norm_act.py.
"""

import itertools

import pytest
import torch
from cuda_emu.batch_norm_act import MULTI_PASS, ONE_PASS, Call, U, in_memory, near
from cuda_emu.run import DTYPE_NUMBER, Case, run_cases
from support.seeds import seeded

DTYPES = [torch.float32, torch.bfloat16]
FULL = ("relu6", True, True, True, True)
H200 = {"sm_count": 132, "shared_bytes": ONE_PASS}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_by_themselves(dtype: torch.dtype, channels_last: bool) -> None:
    # Statistics without y, the sums without dx, and dx from sums and a count that are not x's own.
    calls = [
        Call(dtype, shape, FULL, shared_bytes=path)
        for shape, path in itertools.product([(3, 8, 5, 7), (17, 16, 7, 7)], [MULTI_PASS, ONE_PASS])
    ]
    cases = []
    for call in calls:
        stats, sums = call.forward(channels_last), call.backward(channels_last)
        del stats.outputs["y"], sums.outputs["dx"]
        dx = call.backward(channels_last, want_dresidual=False)
        n = call.x.numel() / call.shape[1]
        dx.outputs = {"dx": dx.outputs["dx"]}
        # Ranks of a batch twice as large: twice the sums and the count leave dx as it is.
        dx.inputs |= {"dweight": 2 * call.dweight.float(), "dbias": 2 * call.dbias.float()}
        dx.inputs["total"] = torch.tensor([2.0 * n])
        cases += stats, sums, dx
    results = run_cases("batch_norm_act", cases)
    for i, call in enumerate(calls):
        stats, sums, dx = results[3 * i : 3 * i + 3]
        near(stats, "mean", call.mean, call.mean_error)
        near(stats, "var", call.var, call.var_error)
        near(sums, "dbias", call.dbias, call.dbias_error)
        near(sums, "dweight", call.dweight, call.dweight_error)
        assert torch.equal(
            sums.tensors["dresidual"].double(), in_memory(call.dz, channels_last)
        )  # relu6: dy or 0
        error = in_memory(call.dx_error, channels_last)
        near(dx, "dx", in_memory(call.dx, channels_last), error)


@pytest.mark.parametrize("c", [1, 256, 300])
def test_merge(c: int) -> None:
    # Ranks with many values, few, and none; the means lie 1e3 deviations from 0.
    normal = seeded(c)
    counts = torch.tensor([100.0, 0.0, 1.0, 7.0, 3000.0])
    means = torch.randn(5, c, generator=normal) + 1e3
    variances = torch.rand(5, c, generator=normal)
    variances[2] = 0
    for empty in (1, slice(0, 5)):
        counts[empty], means[empty], variances[empty] = 0, 0, 0
        gathered = torch.cat([means, variances, counts[:, None]], 1)
        numbers = {"c": c, "ranks": 5, "dtype": DTYPE_NUMBER[torch.float32], **H200}
        outputs = {"mean": torch.empty(c), "var": torch.empty(c), "total": torch.empty(1)}
        case = Case("merge", numbers, inputs={"gathered": gathered}, outputs=outputs)
        result = run_cases("batch_norm_act", [case])[0]
        total = counts.double().sum()
        assert result.tensors["total"].item() == total.item()
        if total == 0:  # as of an empty batch
            assert not result.tensors["mean"].any()
            assert (result.tensors["var"] == 1).all()
            continue
        n, mean, var = (t.double() for t in (counts[:, None], means, variances))
        expected = (n * mean).sum(0) / total
        spread = (n * (var + (mean - expected).square())).sum(0) / total
        # Each of 4 merges rounds the mean, the product and the sum; a delta of two means of 1e3
        # carries an ulp of those, times the spread of the means.
        mean_error = 4 * 3 * U * means.abs().amax(0).double()
        near(result, "mean", expected, mean_error)
        reach = (mean - expected).abs().amax(0)
        near(result, "var", spread, 4 * 5 * U * spread + 2 * 4 * mean_error * reach)


def test_running_statistics_with_a_total() -> None:
    # The count comes from the device. Below 2 there is no unbiased variance, and nothing moves.
    for total in (1.0, 2.0, 50.0):
        old = {"running_mean": torch.tensor([1.0, -2.0]), "running_var": torch.tensor([3.0, 0.5])}
        numbers = {"c": 2, "dtype": 0, "stats_dtype": 0, "momentum": 0.25, "unbias": 1.0, **H200}
        new = {"mean": torch.tensor([0.5, 4.0]), "var": torch.tensor([2.0, 1.5])}
        inputs = {**new, "total": torch.tensor([total])}
        result = run_cases("batch_norm_act", [Case("running", numbers, inputs, updated=old)])[0]
        unbias = total / (total - 1) if total >= 2 else 1
        for name, factor in (("mean", 1.0), ("var", unbias)):
            before = old[f"running_{name}"].double()
            want = torch.lerp(before, new[name].double() * factor, 0.25 if total >= 2 else 0.0)
            near(result, f"running_{name}", want, 6 * U * (before.abs() + 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinity_makes_the_mean_infinite(dtype: torch.dtype) -> None:
    # As PyTorch's on the CPU: the sum over the count, and NaN as variance; in every path, wherever
    # the value lies: alone in a lane, in a group of four, or in a split of its own.
    cases, wanted = [], []
    for shape, path in itertools.product([(2, 8, 9, 8), (16, 8, 7, 7)], [MULTI_PASS, ONE_PASS]):
        for channels_last, values in itertools.product(
            [False, True], [("inf",), ("-inf",), ("inf", "inf"), ("inf", "-inf"), ("nan",)]
        ):
            call = Call(dtype, shape, FULL, shared_bytes=path)
            x = call.x.clone()
            for place, value in zip((x[0, 0, 0], x[-1, 0, -1]), values, strict=False):
                place[-1] = float(value)
            case = call.forward(channels_last)
            case.inputs["x"] = in_memory(x, channels_last)
            cases.append(case)
            wanted.append((x[:, 0].float().sum().item(), call))
    for result, (mean, call) in zip(run_cases("batch_norm_act", cases), wanted, strict=True):
        assert str(result.tensors["mean"][0].item()) == str(mean)
        assert result.tensors["var"][0].isnan()
        others = (result.tensors["mean"][1:].double() - call.mean[1:]).abs()
        assert (others <= call.mean_error[1:]).all()


@pytest.mark.parametrize(
    ("shape", "channels_last", "bytes_", "tensors", "expected"),
    [
        # n, c, hw; elements of 2 bytes; 1 tensor is the forward, 2 the backward.
        # one_pass, tiles, splits, vector, columns, repeat
        ((32, 512, 49), True, 2, 1, (1, 32, 1, 8, 2, 1)),  # 32 bytes of a pixel a block
        ((32, 512, 196), True, 2, 1, (0, 2, 132, 8, 32, 1)),  # 49 steps: multi-pass
        ((2, 8192, 49), True, 2, 1, (1, 256, 1, 8, 4, 1)),  # 64 bytes: no SM is without a block
        ((32, 512, 49), False, 2, 1, (1, 64, 1, 8, 49, 49)),  # flat, 8 planes a block
        ((32, 512, 196), False, 2, 1, (1, 256, 1, 8, 49, 196)),  # flat, 2 planes
        ((32, 512, 784), False, 2, 1, (1, 512, 1, 8, 1, 1)),  # a plane of whole vectors
        ((256, 512, 784), False, 2, 1, (0, 512, 1, 8, 1, 1)),  # 98 steps: multi-pass
        ((256, 64, 12544), True, 2, 1, (0, 1, 264, 8, 8, 1)),  # 2 blocks an SM
        ((256, 2048, 49), False, 2, 1, (0, 392, 1, 8, 32, 49)),  # flat: 52 steps of 5 lanes
        ((8, 512, 784), False, 4, 2, (1, 512, 1, 4, 1, 1)),  # two tensors of 25 KB
    ],
)
def test_the_choice(
    shape: tuple[int, int, int],
    channels_last: bool,
    bytes_: int,
    tensors: int,
    expected: tuple[int, ...],
) -> None:
    n, c, hw = shape
    numbers = {"n": n, "c": c, "hw": hw, "channels_last": int(channels_last), **H200}
    numbers |= {"bytes": bytes_, "tensors": tensors}
    case = Case("plan", numbers, outputs={"chosen": torch.empty(6, dtype=torch.int64)})
    chosen = run_cases("batch_norm_act", [case])[0].tensors["chosen"]
    assert tuple(chosen.tolist()) == expected


# Of EfficientNet, MobileNet, ConvNeXt, DenseNet and ResNet, which no power of two divides well.
CHANNELS = (24, 40, 48, 72, 96, 112, 144, 160, 192, 240, 288, 320, 384, 480, 576, 672, 768, 960)


@pytest.mark.parametrize("bytes_", [2, 4])
def test_few_threads_are_idle(bytes_: int) -> None:
    sizes = {"n": 64, "hw": 3136, "channels_last": 1, "bytes": bytes_, "tensors": 1}
    cases = [
        Case(
            "plan",
            {**H200, **sizes, "c": c, "shared_bytes": MULTI_PASS},
            outputs={"chosen": torch.empty(6, dtype=torch.int64)},
        )
        for c in CHANNELS
    ]
    for c, result in zip(CHANNELS, run_cases("batch_norm_act", cases), strict=True):
        one_pass, tiles, splits, vector, columns, _ = result.tensors["chosen"].tolist()
        assert not one_pass
        assert vector == 16 // bytes_
        assert columns * tiles >= c // vector > columns * (tiles - 1)
        busy = c // vector * (256 // columns) / (tiles * 256)
        assert busy >= 0.9, f"{c} channels: {busy:.0%} of the threads, {columns} columns"
        assert 0.9 * 264 <= tiles * splits <= 264  # two blocks on each of 132 SMs
