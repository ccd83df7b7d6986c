"""depthwise_conv2d against torch.nn.functional.conv2d in float64: values, gradients, bits."""

import pytest
import torch
from support import depthwise_conv2d_cases as cases
from support.activations import ACTS
from support.depthwise_conv2d_cases import WINDOWS, Window, made, results
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded
from torch import nn

from fastcnn import reference
from fastcnn.functional import depthwise_conv2d
from fastcnn.nn import DepthwiseConv2d

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SMALL = cases.square((2, 5, 6, 7), 3, 2, 1, "small enough for gradcheck")


def check(case: cases.Case) -> None:
    found, expected, errors = results(depthwise_conv2d, case), cases.exact(case), cases.errors(case)
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert_rounded(name, t, expected[name], errors[name])


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_against_float64(window: Window, dtype: torch.dtype, layout: str) -> None:
    case = made(window, dtype, layout)
    check(case)
    y = results(depthwise_conv2d, case)["y"]
    if not (case.x.is_contiguous() and layout == "channels_last"):  # dense in both: NCHW
        assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, dtype: torch.dtype, layout: str) -> None:
    for window in (WINDOWS[5], WINDOWS[7], WINDOWS[25]):  # a mask, own loops, any window
        check(made(window, dtype, layout, act, bias=act != "silu"))


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_float32_parameters_beside_half_images(dtype: torch.dtype) -> None:
    check(made(WINDOWS[7], dtype, "channels_last", "silu", param_dtype=torch.float32))


@pytest.mark.parametrize("act", ["none", "silu"])
def test_the_reference_agrees(act: str) -> None:
    for window in (WINDOWS[9], WINDOWS[21], WINDOWS[25]):
        case = made(window, torch.float64, "nchw", act)
        assert_rounded("y", results(reference.depthwise_conv2d, case)["y"], cases.exact(case)["y"],
                       cases.errors(case)["y"])  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["none", "gelu"])
def test_gradcheck(act: str, layout: str) -> None:
    case = made(SMALL, torch.float64, layout, act)
    leaves = [t.requires_grad_() for t in case[:3]]
    assert torch.autograd.gradcheck(
        lambda *t: depthwise_conv2d(*t, *case.geometry, act=act), leaves
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, layout: str) -> None:
    threads = torch.get_num_threads()
    try:
        for window in (WINDOWS[26], WINDOWS[14], WINDOWS[9]):
            case, found = made(window, dtype, layout, "silu"), []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(results(depthwise_conv2d, case))
            for other in found[1:]:
                assert all(torch.equal(t, other[name]) for name, t in found[0].items())
    finally:
        torch.set_num_threads(threads)


def test_each_gradient_alone() -> None:
    # Frozen filters, or an input that needs no gradient: the same bits, and nothing else computed.
    case = made(WINDOWS[7], torch.float32, "channels_last", "silu")
    whole = results(depthwise_conv2d, case)
    for i, name in enumerate(("dx", "dweight", "dbias")):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(case[:3])]
        depthwise_conv2d(*leaves, *case.geometry, act="silu").backward(case.dy)
        assert torch.equal(leaves[i].grad, whole[name])
        assert [t.grad is None for t in leaves] == [i != j for j in range(3)]


def test_a_gradient_of_other_strides() -> None:
    case = made(WINDOWS[7], torch.float32, "channels_last")
    x = case.x.detach().requires_grad_()
    depthwise_conv2d(x, case.weight, None, *case.geometry).sum().backward()  # expanded
    ones = torch.ones_like(case.dy)
    expected = cases.exact(case._replace(dy=ones))["dx"]
    assert_rounded("dx", x.grad, expected, cases.errors(case._replace(dy=ones))["dx"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch(layout: str) -> None:
    case = made(WINDOWS[7]._replace(sizes=(0, 33, 14, 15)), torch.float32, layout, "relu")
    found = results(depthwise_conv2d, case)
    assert found["y"].shape == (0, 33, 14, 15)
    assert not found["dweight"].any()
    assert not found["dbias"].any()


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinite_and_nan_values_stay_where_they_are(layout: str) -> None:
    # Columns beside the image, and those that fill a vector, are no values.
    x = torch.ones(1, 33, 9, 9).contiguous(memory_format=LAYOUTS[layout])
    x[0, 0, 4, 8], x[0, 1, 0, 0] = torch.inf, torch.nan
    case = cases.Case(x, torch.ones(33, 1, 3, 3), torch.zeros(33), x, ((1, 1),) * 3, "none")
    case = case._replace(dy=torch.ones_like(x))
    found, expected = results(depthwise_conv2d, case), cases.exact(case)
    for name, t in found.items():
        expected_t = expected[name].to(t.dtype)
        torch.testing.assert_close(t, expected_t, rtol=0, atol=0, equal_nan=True, msg=name)


def test_autocast_casts_as_a_convolution() -> None:
    case = made(WINDOWS[7], torch.float32, "channels_last")
    half = made(WINDOWS[7], torch.float32, "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(*case[:3], *case.geometry)
    halves = (t.bfloat16() for t in half[:3])
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, depthwise_conv2d(*halves, *case.geometry))


def test_the_module_is_a_convolution() -> None:
    ours = DepthwiseConv2d(6, 3, stride=2, padding=1, act="relu6")
    theirs = nn.Conv2d(6, 6, 3, 2, 1, groups=6)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(ours(x), ACTS["relu6"](theirs(x)))
    assert repr(ours) == (
        "DepthwiseConv2d(6, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=6, "
        "act=relu6)"
    )
