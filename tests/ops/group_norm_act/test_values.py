"""group_norm_act against torch.nn.functional.group_norm, and its form by pixels against layer_norm.

With PyTorch's activations, in float64; the expected gradients are autograd's. How exact a result
must be, and why: support/tolerance.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from support.activations import ACTS, near_nondifferentiable
from support.group_norm_cases import (
    DTYPES,
    PIXELS,
    Case,
    check,
    errors,
    fastcnn_norm_act,
    make_case,
    run,
    torch_norm_act,
)
from support.seeds import seed_all
from support.shapes import GROUPED, LAYOUTS, Image
from support.tolerance import assert_rounded, assert_same
from torch import Tensor
from torch.autograd import gradcheck

from fastcnn import reference


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("image", "groups"), GROUPED, ids=str)
def test_every_shape(image: Image, groups: int, layout: str) -> None:
    check(make_case(image.sizes, groups, torch.float32, layout, "relu"))
    check(make_case(image.sizes, groups, torch.bfloat16, layout, "silu"))
    check(make_case(image.sizes, PIXELS, torch.float32, layout, "none"))
    check(make_case(image.sizes, PIXELS, torch.bfloat16, layout, "gelu"))


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(dtype: torch.dtype, layout: str) -> None:
    # One odd shape with rests in both layouts, and all there is beside it.
    for act, groups in itertools.product(ACTS, (1, 2, 6, PIXELS)):
        check(make_case((5, 6, 9, 11), groups, dtype, layout, act))


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_channels_than_a_chunk_holds(layout: str) -> None:
    # Of a pixel's channels in channels_last: 32 KB, and one more (csrc/cpu/moments.h).
    for dtype, channels in ((torch.float32, 8193), (torch.bfloat16, 16385)):
        check(make_case((1, channels, 1, 3), PIXELS, dtype, layout, "relu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_half_images(dtype: torch.dtype) -> None:
    # The usual state of mixed precision: gradients of parameters must then be float32 too. PyTorch
    # refuses the mixture where it is not all on one side: the oracle's parameters are rounded.
    for layout, groups in itertools.product(LAYOUTS, (2, PIXELS)):
        case = make_case((4, 6, 5, 5), groups, dtype, layout, "relu", torch.float32)
        for name in ("weight", "bias"):
            getattr(case, name).copy_(getattr(case, name).to(dtype))
        actual, expected = run(fastcnn_norm_act, case), run(fastcnn_norm_act, case.to(dtype))
        for k, t in actual.items():
            assert t.dtype is (torch.float32 if k in ("dweight", "dbias") else dtype)
            assert torch.equal(t.to(dtype), expected[k]), k


def test_the_reference_against_torch() -> None:
    # It is the oracle of the CUDA kernels' tests.
    def reference_norm_act(case: Case) -> Tensor:
        args = case.x, case.groups, case.weight, case.bias, case.eps, case.act
        return reference.group_norm_act(*args)[0]

    for act, groups in itertools.product(ACTS, (1, 2, 4, PIXELS)):
        case = make_case((3, 4, 5, 6), groups, torch.float64, "nchw", act)
        assert_same(run(reference_norm_act, case), run(torch_norm_act, case))


@pytest.mark.parametrize("groups", [2, PIXELS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_any_layout(layout: str, groups: int | None) -> None:
    # Each is brought to x's layout: the same bits as from a dense dy of the same values.
    case = make_case((4, 6, 5, 7), groups, torch.float32, layout)
    other = LAYOUTS["nchw" if layout == "channels_last" else "channels_last"]
    for dy in (
        torch.ones(()).expand(case.x.shape),  # what y.sum().backward() sends: strides 0
        torch.randn(case.x.shape).contiguous(memory_format=other),
        torch.randn(4, 6, 5, 14)[..., ::2],  # strided
    ):
        dense = dy.contiguous(memory_format=LAYOUTS[layout])
        actual = run(fastcnn_norm_act, replace(case, dy=dy))
        for k, expected in run(fastcnn_norm_act, replace(case, dy=dense)).items():
            assert torch.equal(actual[k], expected), k


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_a_batch(layout: str, dtype: torch.dtype) -> None:
    # 3 * 5 * 7 elements an image: a slice starts at an address that is no multiple of a vector.
    for groups in (1, 3, PIXELS):
        case = make_case((4, 3, 5, 7), groups, dtype, layout)
        views = {}
        for k in ("x", "dy"):
            base = torch.empty((5, 3, 5, 7), dtype=dtype, memory_format=LAYOUTS[layout])
            base[1:] = getattr(case, k)
            views[k] = base[1:]
        actual, expected = run(fastcnn_norm_act, replace(case, **views)), check(case)
        assert views["x"].data_ptr() % 16 != 0
        assert all(torch.equal(actual[k], expected[k]) for k in actual)


def test_without_affine_parameters() -> None:
    # None stands for 1 and 0; each may be missing alone.
    for layout, groups, missing in itertools.product(
        LAYOUTS, (2, PIXELS), (["weight"], ["bias"], ["weight", "bias"])
    ):
        case = make_case((3, 4, 5, 6), groups, torch.float32, layout, "none")
        actual = run(fastcnn_norm_act, replace(case, **dict.fromkeys(missing)))
        neutral = {"weight": torch.ones(4), "bias": torch.zeros(4)}
        given = check(replace(case, **{name: neutral[name] for name in missing}))
        assert all(torch.equal(t, given[k]) for k, t in actual.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_keeps_its_variance(layout: str) -> None:
    # Mean 1e4, deviation 1: of E[x^2] - E[x]^2 no digit is left in float32.
    ops = torch.ops.fastcnn
    for (image, own), by_pixel in itertools.product(GROUPED, [False, True]):
        groups = PIXELS if by_pixel else own
        case = make_case(image.sizes, groups, torch.float32, layout, "none")
        case = replace(case, x=case.x + 1e4)
        if groups is PIXELS:
            _, mean, var = ops.pixel_norm_act_fwd(case.x, None, None, case.eps, 0)
        else:
            _, mean, var = ops.group_norm_act_fwd(case.x, None, None, groups, case.eps, 0)
        _, *exact = reference.group_norm_act(case.x.double(), groups)
        for k, t, e in zip(("running_mean", "running_var"), (mean, var), exact, strict=True):
            error = errors(case)[k][:, :: image.c // (groups or 1)].reshape(t.shape)
            assert_rounded(f"{image}, {groups}: {k}", t, e, error)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_in_its_group(value: float, layout: str) -> None:
    # A diverged network must show it, and where: it makes all that is normalised with it NaN.
    for groups, dtype, act in itertools.product((2, 4, PIXELS), DTYPES[:2], ACTS):
        case = make_case((3, 4, 5, 7), groups, dtype, layout, act)
        case.x[1, 2, 3, 4] = value
        actual, expected = run(fastcnn_norm_act, case), run(torch_norm_act, case)
        for k in ("y", "dx"):
            assert torch.equal(actual[k].isnan(), expected[k].isnan()), (k, groups, dtype, act)


def test_an_empty_batch_is_torchs() -> None:
    # The last batch of a sharded loader: nothing to normalise, gradients of parameters are 0.
    for layout, groups in itertools.product(LAYOUTS, (1, 3, PIXELS)):
        x = torch.empty((0, 3, 4, 5), memory_format=LAYOUTS[layout])
        case = Case(x, torch.ones(3), torch.ones(3), x.clone(), groups, "relu")
        expected = run(torch_norm_act, case)
        for k, t in run(fastcnn_norm_act, case).items():
            assert torch.equal(t, expected[k]), k


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str) -> None:
    # Against differences of the forward itself, by all inputs at once, away from jumps
    # of act'.
    seed_all(0)
    weight, bias = torch.tensor([[3.0, -2.5, 1, 2], [0.5, 1, -1, 0]], dtype=torch.float64)
    for act, groups in itertools.product(ACTS, (1, 2, 4, PIXELS)):
        near = torch.tensor(True)
        while near.any():  # gradcheck's steps of 1e-6 must not cross a jump of act'
            x = torch.randn(2, 4, 2, 3).double().contiguous(memory_format=LAYOUTS[layout])
            case = Case(x, weight, bias, x, groups, act)
            near = near_nondifferentiable(fastcnn_norm_act(replace(case, act="none")), act, 1e-3)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        assert gradcheck(
            lambda x, w, b, c=case: fastcnn_norm_act(replace(c, x=x, weight=w, bias=b)), leaves
        )


def test_the_same_bits_on_any_number_of_threads_and_in_every_run() -> None:
    # Sums are cut by shape alone. Many samples; large ones that are cut into parts, 3 of them: one
    # thread goes through each, two share each.
    threads = torch.get_num_threads()
    sizes = [(20, 32, 29, 31), (3, 4, 160, 160)]
    try:
        for layout, size, groups in itertools.product(LAYOUTS, sizes, (1, 4, PIXELS)):
            case = make_case(size, groups, torch.float32, layout)
            first = run(fastcnn_norm_act, case)
            for count in (1, 2, 2):
                torch.set_num_threads(count)
                for k, t in run(fastcnn_norm_act, case).items():
                    assert torch.equal(t, first[k]), (k, layout, count)
    finally:
        torch.set_num_threads(threads)
