"""batch_norm_act against torch.nn.functional.batch_norm and PyTorch's activations in float64.

The expected gradients are autograd's. How exact a result must be, and why: support/tolerance.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.activations import ACTS, near_nondifferentiable
from support.batch_norm_cases import (
    Case,
    check,
    fastcnn_batch_norm_act,
    make_case,
    normalised,
    run,
    torch_batch_norm_act,
)
from support.norm_cases import norm_errors
from support.seeds import seeded
from support.shapes import EDGES, LAYOUTS, RESNET50, Image
from support.tolerance import assert_rounded, assert_same, walk
from torch import Tensor
from torch.autograd import gradcheck

from fastcnn import functional, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Two of a network's shapes in the quick run: none of their loops is another one than of EDGES.
LARGE = [*RESNET50[5:8:2], *(pytest.param(i, marks=pytest.mark.slow) for i in RESNET50)]
TRAINING_AND_EVAL = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", [*EDGES, *LARGE], ids=str)
def test_every_shape(image: Image, layout: str) -> None:
    # The backward has four ways to dz: each in one of these.
    check(make_case(image.sizes, torch.float32, layout, "relu6"))
    check(make_case(image.sizes, torch.float32, layout, "silu", residual=True))
    check(make_case(image.sizes, torch.bfloat16, layout, "gelu"))
    check(make_case(image.sizes, torch.bfloat16, layout, "relu", residual=True))


@pytest.mark.every_level
@TRAINING_AND_EVAL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(dtype: torch.dtype, layout: str, training: bool) -> None:
    # One odd shape with rests in both layouts, and all there is beside it.
    for act, residual in itertools.product(ACTS, [False, True]):
        check(make_case((5, 7, 9, 11), dtype, layout, act, residual, training))


@TRAINING_AND_EVAL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_half_images(dtype: torch.dtype, training: bool) -> None:
    # The usual state of mixed precision: gradients of parameters must then be float32 too.
    for layout in LAYOUTS:
        check(make_case((4, 6, 5, 5), dtype, layout, "relu", True, training, torch.float32))


@TRAINING_AND_EVAL
def test_gradients_below_float16_s_normal_numbers(training: bool) -> None:
    # dresidual is rounded there by half of 2^-24, whatever its size, and dx is 300 times as large.
    case = make_case((2, 6, 9, 7), torch.float16, "nchw", "silu", True, training)
    assert case.running_var is not None
    var = (case.running_var * 1e-6).float()
    mean = (case.running_mean * 1e-3).float()
    small = replace(case, x=case.x * 1e-3, dy=case.dy * 1e-5, running_mean=mean, running_var=var)
    check(small)


@TRAINING_AND_EVAL
def test_the_reference_against_torch(training: bool) -> None:
    # It is the oracle of the CUDA kernels' tests.
    def reference_batch_norm_act(case: Case) -> Tensor:
        mean, var = (None, None) if case.training else (case.running_mean, case.running_var)
        args = (case.x, case.weight, case.bias, mean, var, case.residual, case.eps, case.act)
        return reference.batch_norm_act(*args)[0]

    for act, residual in itertools.product(ACTS, [False, True]):
        case = make_case((3, 4, 5, 5), torch.float64, "nchw", act, residual, training)
        actual, expected = run(reference_batch_norm_act, case), run(torch_batch_norm_act, case)
        for k in actual.keys() - {"running_mean", "running_var"}:
            assert_same(actual[k], expected[k], name=k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(layout: str) -> None:
    # Each is brought to x's layout: the same bits as from a dense dy of the same values.
    case = make_case((4, 6, 5, 7), torch.float32, layout, residual=True)
    other = LAYOUTS["nchw" if layout == "channels_last" else "channels_last"]
    wide = torch.randn(4, 6, 5, 14)
    for dy in (
        torch.ones(()).expand(case.x.shape),  # what y.sum().backward() sends: strides 0
        torch.randn(6, 1, 1).expand(case.x.shape),  # from a broadcast product
        torch.randn(case.x.shape).contiguous(memory_format=other),
        wide[..., ::2],  # strided
        torch.randn(4, 6, 7, 5).mT,  # transposed
    ):
        dense = dy.contiguous(memory_format=LAYOUTS[layout])
        actual = run(fastcnn_batch_norm_act, replace(case, dy=dy))
        for k, expected in run(fastcnn_batch_norm_act, replace(case, dy=dense)).items():
            assert torch.equal(actual[k], expected), k


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_a_batch(layout: str, dtype: torch.dtype) -> None:
    # 3 * 5 * 7 elements an image: a slice starts at an address that is no multiple of a vector.
    case = make_case((4, 3, 5, 7), dtype, layout, residual=True)

    def sliced(t: Tensor) -> Tensor:
        base = torch.empty((5, *t.shape[1:]), dtype=dtype, memory_format=LAYOUTS[layout])
        base[1:] = t
        return base[1:]

    views = {k: sliced(getattr(case, k)) for k in ("x", "residual", "dy")}
    actual, expected = run(fastcnn_batch_norm_act, replace(case, **views)), check(case)
    assert views["x"].data_ptr() % 16 != 0
    assert all(torch.equal(actual[k], expected[k]) for k in actual)


@TRAINING_AND_EVAL
def test_without_affine_parameters(training: bool) -> None:
    # None stands for 1 and 0; each may be missing alone.
    for layout, missing in itertools.product(LAYOUTS, (["weight"], ["bias"], ["weight", "bias"])):
        case = make_case((3, 5, 4, 6), torch.float32, layout, "none", False, training)
        check(replace(case, **dict.fromkeys(missing)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_keeps_its_variance(layout: str) -> None:
    # Mean 1e4, deviation 1: E[x^2] - E[x]^2 is a difference of values with an ulp of 8 in float32.
    for image in EDGES:
        case = make_case(image.sizes, torch.float32, layout, "none")
        case = replace(case, x=case.x + 1e4, momentum=1.0)
        var = run(fastcnn_batch_norm_act, case, forward_only=True)["running_var"]
        error = norm_errors(normalised(case), torch.float32)["running_var"].flatten()
        assert_rounded(f"{image}: variance", var, case.x.double().var((0, 2, 3)), error)


def test_the_first_of_averaged_statistics_replaces_what_was_there() -> None:
    # Momentum 1, as BatchNormAct2d(momentum=None) passes for its first batch: of a small variance
    # all digits count, not those that are left beside the initial 1.
    x = 0.01 * torch.randn(2, 3, 4, 5, generator=seeded(1))
    mean, var = torch.full((3,), 1e3), torch.ones(3)
    functional.batch_norm_act(x, mean, var, training=True, momentum=1.0)
    # Lerped from 1, it would err by half an ulp of 1, which is 6e-4 of it; the bound is 1.3e-5.
    exact, error = x.double(), walk(40, x.dtype)
    assert_rounded("mean", mean, exact.mean((0, 2, 3)), error * exact.abs().mean((0, 2, 3)))
    assert_rounded("var", var, v := exact.var((0, 2, 3)), 4 * error * v)


@TRAINING_AND_EVAL
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_propagate_as_in_torch(value: float, training: bool) -> None:
    # A diverged network must show it. One bad value spoils its channel in training, itself in eval.
    # (There PyTorch's own silu, gelu and hardswish lose an infinite z's limit: test_activation.py.)
    for layout, dtype, act in itertools.product(LAYOUTS, DTYPES[:2], ACTS):
        if act in ("silu", "gelu", "hardswish") and not training and value == value:
            continue
        case = make_case((3, 4, 5, 7), dtype, layout, act, training=training)
        case.x[1, 2, 3, 4] = value
        actual, expected = run(fastcnn_batch_norm_act, case), run(torch_batch_norm_act, case)
        for k in ("y", "dx", "running_mean", "running_var"):
            for test in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(test(actual[k]), test(expected[k])), (k, test, layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mean_of_what_is_not_finite(layout: str) -> None:
    # Infinite where all such values are, wherever in the batch they lie: parts without any are
    # merged before and after. PyTorch's mean is the sum over the count; its variance is NaN then.
    inf, nan = float("inf"), float("nan")
    for image, dtype in itertools.product(EDGES[4:], DTYPES[:2]):
        for values in ((inf,), (-inf,), (inf, inf), (inf, -inf), (nan, inf)):
            x = torch.randn(image.sizes).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            at = torch.linspace(0, image.n * image.h * image.w - 1, 5).long()[[3, 1]]
            for where, value in zip(at, values, strict=False):
                n, pixel = divmod(int(where), image.h * image.w)
                x[n, 0, pixel // image.w, pixel % image.w] = value
            found = []
            for f in (functional.batch_norm_act, F.batch_norm):
                mean, var = torch.zeros(image.c).to(dtype), torch.zeros(image.c).to(dtype)
                f(x, mean, var, training=True)
                found.append((mean[0].item(), var[0].item(), bool(mean[1:].isfinite().all())))
            assert str(found[0]) == str(found[1]), (image, dtype, values)


@TRAINING_AND_EVAL
def test_an_empty_batch_is_torchs(training: bool) -> None:
    # The last batch of a sharded loader: nothing to normalise, statistics stay, gradients are 0.
    for layout, residual in itertools.product(LAYOUTS, [False, True]):
        case = make_case((0, 3, 4, 5), torch.float32, layout, "relu", residual, training)
        expected = run(torch_batch_norm_act, case)
        assert all(
            torch.equal(t, expected[k]) for k, t in run(fastcnn_batch_norm_act, case).items()
        )


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    # A frozen gamma or a residual from a frozen trunk must not receive one.
    case = make_case((2, 3, 4, 4), torch.float32, residual=True)
    for name in ("x", "residual", "weight", "bias"):
        leaf = getattr(case, name).clone().requires_grad_()
        fastcnn_batch_norm_act(replace(case, **{name: leaf})).backward(case.dy)
        assert torch.equal(leaf.grad, run(fastcnn_batch_norm_act, case)[f"d{name}"]), name
    assert not fastcnn_batch_norm_act(case).requires_grad


def test_the_same_bits_on_any_number_of_threads_and_in_every_run() -> None:
    # Sums are cut by shape alone. These shapes are large enough for several tasks.
    threads = torch.get_num_threads()
    try:
        for layout, sizes in itertools.product(LAYOUTS, [(8, 32, 29, 31), (2, 3, 128, 128)]):
            case = make_case(sizes, torch.float32, layout, residual=True)
            first = run(fastcnn_batch_norm_act, case)
            for count in (1, 2, 2):
                torch.set_num_threads(count)
                for k, t in run(fastcnn_batch_norm_act, case).items():
                    assert torch.equal(t, first[k]), (k, layout, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, training: bool) -> None:
    # Against differences of the forward itself, by all inputs at once.
    weight, bias = torch.tensor([[3.0, -2.5], [0.5, 1.0]], dtype=torch.float64)
    mean, var = torch.tensor([[0.1, -0.2], [0.8, 1.5]], dtype=torch.float64)
    stats = (None, None) if training else (mean, var)

    def run(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor, act: str) -> Tensor:
        added = residual[0] if residual else None
        return functional.batch_norm_act(x, *stats, weight, bias, training, residual=added, act=act)

    for act, residual in itertools.product(ACTS, [False, True]):
        near = torch.tensor(True)
        while near.any():  # gradcheck's steps of 1e-6 must not cross a jump of act'
            images = torch.randn(1 + residual, 3, 2, 3, 2, dtype=torch.float64).unbind()
            images = [t.contiguous(memory_format=LAYOUTS[layout]) for t in images]
            leaves = [images[0], weight, bias, *images[1:]]
            z = run(*leaves, act="none")
            near = near_nondifferentiable(z, act, 1e-3)
        leaves = [t.clone().requires_grad_() for t in leaves]
        assert gradcheck(lambda *t, a=act: run(*t, act=a), leaves)
