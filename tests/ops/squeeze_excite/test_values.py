"""squeeze_excite against torch's own functions in float64: values, gradients, bits."""

import pytest
import torch
from support import squeeze_excite_cases as cases
from support.activations import ACTS
from support.shapes import LAYOUTS
from support.squeeze_excite_cases import GATES, SIZES, Sizes, made, results
from support.tolerance import assert_rounded
from torch import nn

from fastcnn import reference
from fastcnn.functional import squeeze_excite
from fastcnn.nn import SqueezeExcite

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SMALL = Sizes(2, 5, 3, 4, 3, "small enough for gradcheck")
LARGE = Sizes(3, 530, 3, 3, 141, "weights read once for all samples")
ops = torch.ops.fastcnn


def check(case: cases.Case) -> None:
    found, expected, errors = results(squeeze_excite, case), cases.exact(case), cases.errors(case)
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert_rounded(name, t, expected[name], errors[name])


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, LARGE], ids=str)
def test_against_float64(sizes: Sizes, dtype: torch.dtype, layout: str) -> None:
    case = made(sizes, dtype, layout)
    check(case)
    found = results(squeeze_excite, case)
    for name in ("y", "dx"):
        assert found[name].dtype is dtype
        if not case.x.is_contiguous():  # dense in both orders: NCHW
            assert found[name].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, gate: str) -> None:
    for layout in LAYOUTS:
        check(made(SIZES[6], torch.float32, layout, act, gate, bias=act != "silu"))


@pytest.mark.parametrize("gate", GATES)
def test_one_product(gate: str) -> None:
    check(made(SIZES[10], torch.bfloat16, "channels_last", gate=gate))


def test_an_image_beyond_the_caches() -> None:
    # Stored past them, from 16 MiB on.
    for layout in LAYOUTS:
        check(made(Sizes(2, 64, 180, 190, 4, "17 MiB"), torch.float32, layout))


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_float32_parameters_beside_half_images(dtype: torch.dtype) -> None:
    check(made(SIZES[6], dtype, "channels_last", "silu", param_dtype=torch.float32))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_the_reference_agrees(act: str, gate: str) -> None:
    for sizes in (SIZES[3], SIZES[10]):
        case = made(sizes, torch.float64, "nchw", act, gate)
        assert_rounded("y", results(reference.squeeze_excite, case)["y"], cases.exact(case)["y"],
                       cases.errors(case)["y"])  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("act", "gate"), [("silu", "sigmoid"), ("gelu", "hardsigmoid")])
def test_gradcheck(act: str, gate: str, layout: str) -> None:
    for sizes in (SMALL, SMALL._replace(mid=None)):
        case = made(sizes, torch.float64, layout, act, gate)
        leaves = [None if t is None else t.requires_grad_() for t in case[:5]]
        assert torch.autograd.gradcheck(
            lambda *t: squeeze_excite(*t, act=act, gate=gate),
            leaves,
        )


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, layout: str) -> None:
    # Of the operators: the parameters' gradients are products of PyTorch's.
    threads = torch.get_num_threads()
    try:
        for sizes in [*SIZES[5:], LARGE]:
            case, found = made(sizes, dtype, layout), []
            dy = case.dy.contiguous(memory_format=LAYOUTS[layout])
            fc1, bias1, fc2, bias2 = (None if t is None else t.float() for t in case[1:5])
            if fc2 is None:
                fc1, bias1, fc2, bias2 = None, None, fc1, bias1
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                forward = ops.squeeze_excite_fwd(case.x, fc1, bias1, fc2, bias2, 4, 1)
                _, _, z1, z2 = forward
                backward = ops.squeeze_excite_bwd(dy, case.x, fc1, fc2, z1, z2, 4, 1)
                found.append([*forward, *backward])
            for other in found[1:]:
                assert all(map(torch.equal, found[0], other))
    finally:
        torch.set_num_threads(threads)


def test_each_gradient_alone() -> None:
    # Frozen weights, or an input that needs no gradient: the same bits, and nothing else computed.
    case = made(SIZES[6], torch.float32, "channels_last", "silu")
    whole = results(squeeze_excite, case)
    for i, name in enumerate(("x", *cases.NAMES)):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(case[:5])]
        squeeze_excite(*leaves, act="silu").backward(case.dy)
        assert torch.equal(leaves[i].grad, whole[f"d{name}"])
        assert [t.grad is None for t in leaves] == [i != j for j in range(5)]


def test_a_gradient_of_other_strides() -> None:
    case = made(SIZES[6], torch.float32, "channels_last")
    x = case.x.detach().requires_grad_()
    squeeze_excite(x, *case[1:5]).sum().backward()  # expanded
    ones = case._replace(dy=torch.ones_like(case.dy))
    assert_rounded("dx", x.grad, cases.exact(ones)["dx"], cases.errors(ones)["dx"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch(layout: str) -> None:
    case = made(SIZES[6]._replace(n=0), torch.float32, layout)
    found = results(squeeze_excite, case)
    assert found["y"].shape == (0, 33, 14, 15)
    assert not any(t.any() for t in found.values())


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinite_and_nan_values_stay_in_their_image(layout: str) -> None:
    # What fills a vector beyond a row's end is no value.
    case = made(SIZES[6], torch.float32, layout)
    clean = results(squeeze_excite, case)
    case.x[0, 0, 4, 8], case.x[0, 32, 0, 0] = torch.inf, torch.nan
    found = results(squeeze_excite, case)
    for name in ("y", "dx"):
        assert torch.equal(found[name][1], clean[name][1])
        assert found[name][0].isnan().all()
    mean = ops.squeeze_excite_fwd(case.x, *case[1:5], 1, 0)[1]
    assert mean[0, 0] == torch.inf
    assert mean[0, 32].isnan()
    assert mean.isfinite().sum() == mean.numel() - 2


def test_autocast_casts_nothing() -> None:
    case = made(SIZES[6], torch.float32, "channels_last")
    plain = results(squeeze_excite, case)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(squeeze_excite, case)  # backward in it, too
    assert all(torch.equal(t, plain[name]) for name, t in found.items())


def test_the_module_is_torchvision_s() -> None:
    ours = SqueezeExcite(6, 3, act="silu", gate="hardsigmoid")
    theirs = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.SiLU(), nn.Conv2d(3, 6, 1), nn.Hardsigmoid()
    )
    names = ["1.weight", "1.bias", "3.weight", "3.bias"]
    state = ours.state_dict()
    theirs.load_state_dict(dict(zip(names, state.values(), strict=True)))
    assert list(state) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(ours(x), x * theirs(x))
    assert repr(ours).startswith("SqueezeExcite(\n  act=silu, gate=hardsigmoid\n  (fc1): Conv2d(6,")
