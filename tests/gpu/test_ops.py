"""dropout, interpolate and augment on the GPU, through their public functions and autograd.

Oracles and limits are those of the tests on the CPU; where a result is defined to the bit it is the
CPU operator's. And: no operator with a CUDA implementation goes without a call on the GPU.
"""

import itertools
import re
from typing import Any

import pytest
import torch
from cuda_emu import library
from support import gpu_calls
from support.augment_cases import (
    SIZE,
    clear_of_ties,
    draw_everything,
    level_limit,
    resized,
    smooth_images,
)
from support.device import DEVICE, GPU, HAS_GPU, cuda_operators, needs_gpu, on_gpu
from support.paths import ROOT
from support.seeds import DROPOUT_SEED, seed_all
from support.shapes import EDGES, LAYOUTS, RESNET50, Image
from support.tolerance import assert_rounded, walk
from support.upsample_cases import CASES, MODES, Resize, check, image, run

from fastcnn import reference
from fastcnn.functional import augment, dropout, interpolate
from fastcnn.ops.dropout import draw_seed
from fastcnn.reference.dropout import threshold

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = [pytest.param(image, marks=needs_gpu) for image in RESNET50[::2]]


def test_every_operator_with_a_cuda_implementation_is_called() -> None:
    x = image((2, 16, 5, 7), torch.float16, "channels_last").to(DEVICE)
    weight = image((16, 16, 3, 3), torch.float16, "channels_last").to(DEVICE)
    with on_gpu() as called:
        for name in gpu_calls.CALLS:
            gpu_calls.run(name, *gpu_calls.inputs(name, 0))
        geometry = [1, 1], [1, 1], [1, 1], 1
        torch.ops.fastcnn.conv2d_relu(x, weight, weight[:, 0, 0, 0].contiguous(), None, *geometry)
    assert cuda_operators() <= {
        *called.operators,
        "clone_no_cse",
    }  # of compiled graphs


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: nothing is emulated")
def test_every_cuda_implementation_in_csrc_is_emulated() -> None:
    # One that is not would be called on the CPU, and its tests would show nothing.
    library.load()
    named: set[str] = set()
    for source in (ROOT / "csrc").glob("*.cpp"):
        _, _, cuda = source.read_text().partition("(fastcnn, CUDA, m)")
        named |= set(re.findall(r'm\.impl\(\s*"(\w+)"', cuda))
    assert "batch_norm_act_fwd" in named
    for name in named:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcnn::{name}", library.KEY)
        assert has, name


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*EDGES, *LARGE], ids=str)
def test_dropout_s_masks_and_values_are_the_cpu_operator_s(shape: Image, layout: str) -> None:
    # Also those of one product: x times the scale, rounded once. 1 - 2^-17: a threshold whose upper
    # half is 0, so that nothing is kept without the further draw.
    seed, op = torch.tensor(DROPOUT_SEED), torch.ops.fastcnn.dropout_apply
    for p, per_channel, dtype in itertools.product((0.1, 1 - 2**-17), (False, True), DTYPES):
        x = image(shape.sizes, dtype, layout)
        expected = op(x, None, seed, p, per_channel)
        with on_gpu():
            y = op(x.to(DEVICE), None, seed.to(DEVICE), p, per_channel)
        assert torch.equal(y.cpu(), expected), (p, per_channel, dtype)
        assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_and_its_gradient(dtype: torch.dtype, layout: str) -> None:
    # The oracle is PyTorch's product with the reference's mask in float64; slices start at
    # addresses that no vector may be read from.
    for sizes, added, per_channel, inplace in itertools.product(
        [(5, 7, 9, 11), (2, 64, 8, 8)], [False, True], [False, True], [False, True]
    ):
        base = image((3 * (sizes[0] + 1), *sizes[1:]), dtype, "nchw").to(DEVICE)
        images = [t.contiguous(memory_format=LAYOUTS[layout])[1:] for t in base.chunk(3)]
        x, residual, dy = (t.detach().requires_grad_() for t in images)
        seed_all(5)
        with on_gpu():
            y = dropout(
                x * 1 if inplace else x,
                0.3,
                inplace=inplace,
                per_channel=per_channel,
                residual=residual if added else None,
            )
            y.backward(dy.detach())
        seed_all(5)
        seed = int(draw_seed(DEVICE))
        keep = reference.dropout(torch.ones(sizes), seed, 0.3, None, per_channel) != 0
        assert y.stride() == x.grad.stride() == x.stride()
        assert not added or torch.equal(residual.grad, dy)
        for name, actual, source in (("y", y, x), ("dx", x.grad, dy)):
            product = source.detach().cpu().double() * keep * (2**32 / threshold(0.3))
            term = residual.detach().cpu().double() if added and name == "y" else torch.zeros(1)
            error = walk(1, dtype) * (product.abs() + term.abs())
            assert_rounded(name, actual.detach().cpu(), product + term, error)


# ---- interpolate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MODES, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpolate(case: Resize, layout: str, how: dict[str, Any]) -> None:
    for dtype in DTYPES:
        check(case, dtype, layout, how, GPU)


UNET = [
    pytest.param(Resize((1, 1024, 16, 16), {"scale_factor": 2}, "U-Net"), marks=needs_gpu),
    pytest.param(Resize((2, 128, 128, 128), {"scale_factor": 2}, "U-Net"), marks=needs_gpu),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", UNET, ids=str)
def test_interpolate_of_large_images(case: Resize, layout: str) -> None:
    for how, dtype in itertools.product(MODES[1:], DTYPES[:2]):
        check(case, dtype, layout, how, GPU)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_interpolate_beside_a_skip_is_torch_s_cat(
    layout: str, dtype: torch.dtype, last: bool
) -> None:
    # Channels of no whole vector, of whole ones, none, and a skip that moves them off one.
    for (c_skip, c), how in itertools.product([(3, 4), (16, 32), (0, 2), (5, 16)], MODES):
        x = image((2, c, 5, 6), dtype, layout).to(DEVICE)
        skip = image((2, c_skip, 10, 12), dtype, layout, 1).to(DEVICE).requires_grad_()
        dy = image((2, c + c_skip, 10, 12), dtype, layout, 2).to(DEVICE)
        leaf, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
        dup, dskip = dy.split((c, c_skip) if last else (c_skip, c), 1)[:: 1 if last else -1]
        with on_gpu():
            y = interpolate(leaf, scale_factor=2, **how, concat=skip, concat_last=last)
            y.backward(dy)
            up = interpolate(alone, scale_factor=2, **how)
            up.backward(dup.contiguous(memory_format=LAYOUTS[layout]))
        assert torch.equal(y, torch.cat([up, skip] if last else [skip, up], dim=1))
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        assert torch.equal(leaf.grad, alone.grad)
        assert torch.equal(skip.grad, dskip)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_interpolate_s_gradients_in_any_layout(layout: str) -> None:
    # Slices of channels are read in place, others brought to x's layout: the same bits as dense.
    x = image((2, 6, 5, 4), torch.float32, layout).to(DEVICE)
    other = LAYOUTS["nchw" if layout == "channels_last" else "channels_last"]
    wide = image((2, 20, 10, 8), torch.float32, layout).to(DEVICE)
    for dy, how in itertools.product(
        (
            torch.ones((), device=DEVICE).expand(2, 6, 10, 8),
            wide[:, :6].contiguous(memory_format=other),
            torch.randn(2, 6, 10, 16, device=DEVICE)[..., ::2],
            wide[:, 3:9],
            wide[:, ::3][:, :6],
        ),
        MODES,
    ):
        dense = dy.contiguous(memory_format=LAYOUTS[layout])
        with on_gpu():
            actual, again, expected = (
                run(interpolate, x, g, scale_factor=2, **how) for g in (dy, dy, dense)
            )
        assert torch.equal(actual[1], expected[1])
        assert all(map(torch.equal, actual, again))


def test_empty_batches() -> None:
    for layout, c_skip in itertools.product(LAYOUTS, [None, 2]):
        x = image((0, 3, 4, 5), torch.float32, layout).to(DEVICE).requires_grad_()
        skip = None if c_skip is None else torch.ones(0, c_skip, 8, 10, device=DEVICE)
        with on_gpu():
            y = interpolate(x, scale_factor=2, concat=skip)
            y.sum().backward()
            assert dropout(x).shape == x.shape
        assert y.shape == (0, 3 + (c_skip or 0), 8, 10)
        assert x.grad.shape == x.shape


# ---- augment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [3, 1], ids=["rgb", "grey"])
def test_augment_is_the_reference_s(c: int, layout: str) -> None:
    # Half types are float32 rounded.
    for images, p, size, options in resized(c, LAYOUTS[layout]):
        expected = reference.augment(images, p, size, **options)
        how: dict[str, Any] = {**options, "size": size, "memory_format": LAYOUTS[layout]}
        with on_gpu():
            y, *halves = (augment(images.to(DEVICE), p, **how, dtype=t) for t in DTYPES)
            again = augment(images.to(DEVICE), p, **how)
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        assert (y.cpu() - expected).abs().max() <= 2 * level_limit(images, 100)
        assert all(torch.equal(half, y.to(half.dtype)) for half in halves)
        assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_augment_s_masks_are_the_cpu_operator_s(dtype: torch.dtype) -> None:
    # Nearest sampling: a coordinate beside a half may round to either side, where the compiler
    # fuses a product and a sum.
    images, p = smooth_images(4, 3, *SIZE), draw_everything(4, SIZE, (29, 31))
    labels = torch.arange(4 * SIZE[0] * SIZE[1]).view(4, *SIZE) % 251
    masks = labels.to(dtype)
    _, expected = augment(images, p, size=(29, 31), masks=masks)
    with on_gpu():
        _, found = augment(images.to(DEVICE), p, size=(29, 31), masks=masks.to(DEVICE))
        y, nothing = augment(images[:0].to(DEVICE), p[:0], masks=masks[:0].to(DEVICE))
    clear = clear_of_ties(p, SIZE, (29, 31))
    assert clear.float().mean() > 0.99
    assert torch.equal(found.cpu()[clear], expected[clear])
    assert len(y) == len(nothing) == 0
