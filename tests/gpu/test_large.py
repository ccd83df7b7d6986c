"""Tensors of more than 2^31 elements, on the GPU: a batch that repeats a few images.

Where a 32-bit index overflows, the last images are not what the first ones are. The same bodies run
with few copies where there is no GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from support import triton_interpreter  # noqa: F401 (mends the interpreter)
from support.augment_cases import draw_everything
from support.batch_norm_cases import Case, normalised
from support.device import DEVICE, needs_gpu, on_gpu
from support.norm_cases import Draw, Normalised, halved, norm_errors, normalised_by_group
from support.seeds import DROPOUT_SEED, seeded
from support.shapes import LAYOUTS
from support.tolerance import assert_rounded, walk
from torch import Tensor

from fastcnn.common.conv_epilogue import Epilogue
from fastcnn.common.conv_geometry import ConvGeometry
from fastcnn.functional import augment, batch_norm_act, dropout, group_norm_act, interpolate
from fastcnn.nn import LayerNorm2d
from fastcnn.ops.conv2d.fused import conv2d_fused
from fastcnn.reference.dropout import draws, threshold

pytestmark = pytest.mark.gpu
LARGE = pytest.param(True, marks=needs_gpu, id="large")
SIZE = pytest.mark.parametrize("large", [False, LARGE])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
DTYPE, LIMIT = torch.bfloat16, 2**31


@pytest.fixture(autouse=True)
def freed() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def sizes_of(large: bool) -> tuple[tuple[int, int, int, int], int]:
    """Of the images that are repeated, and how often: 2 % more than 2^31 elements."""
    if not large:
        return (2, 8, 6, 5), 3
    sizes = (8, 64, 112, 112)
    return sizes, LIMIT * 51 // 50 // torch.Size(sizes).numel()


def repeated(t: Tensor, copies: int, layout: str) -> Tensor:
    """As a leaf on the device."""
    format = LAYOUTS[layout]
    many = torch.empty(
        (copies * len(t), *t.shape[1:]), dtype=t.dtype, device=DEVICE, memory_format=format
    )
    for part in many.split(len(t)):
        part.copy_(t)
    return many.requires_grad_()


def assert_repeats(t: Tensor, copies: int) -> Tensor:
    """The first copy, which all others are equal to."""
    first, *others = t.detach().split(len(t) // copies)
    assert all(torch.equal(other, first) for other in others)
    return first.cpu()


def terms_of(name: str, copies: int, *tensors: Tensor) -> Normalised:
    """What is added up where the batch repeats its images."""
    x, weight, bias, residual, dy = (t.detach().double() for t in tensors)
    if name == "batch":
        no_stats = weight, weight
        case = Case(x, residual, weight, bias, *no_stats, dy, True, "silu")
        terms = normalised(case)
        return terms._replace(count=copies * terms.count, samples=copies * terms.samples)
    terms = normalised_by_group(x, weight, bias, dy, 4 if name == "group" else None, 1e-5)
    return terms._replace(samples=copies * terms.samples)


@SIZE
@LAYOUT
@pytest.mark.parametrize("name", ["batch", "group", "pixel"])
def test_normalisations(name: str, layout: str, large: bool) -> None:
    sizes, copies = sizes_of(large)
    draw = Draw(sizes, DTYPE, layout, torch.float32)
    weight, bias = draw.affine("silu")
    x, dy, residual = draw.image(), draw.image(), draw.image()

    def results(x: Tensor, dy: Tensor, residual: Tensor, fused: bool) -> dict[str, Tensor]:
        acc = torch.promote_types(x.dtype, torch.float32)
        w, b = (t.to(x.device, acc, copy=True).requires_grad_() for t in (weight, bias))
        if fused and name == "batch":
            y = batch_norm_act(x, None, None, w, b, True, residual=residual, act="silu")
        elif fused and name == "group":
            y = group_norm_act(x, 4, w, b, act="silu")
        elif fused:
            layer = LayerNorm2d(sizes[1], act="silu", device=x.device)
            w, b = layer.weight, layer.bias
            w.data.copy_(weight)
            b.data.copy_(bias)
            y = layer(x)
        elif name == "batch":
            y = F.silu(F.batch_norm(x, None, None, w, b, True) + residual)
        elif name == "group":
            y = F.silu(F.group_norm(x, 4, w, b))
        else:
            z = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], w, b)
            y = F.silu(z.permute(0, 3, 1, 2))
        y.backward(dy)
        return {"y": y, "dx": x.grad, "dweight": w.grad, "dbias": b.grad}

    many = [repeated(t, copies, layout) for t in (x, dy, residual)]
    assert not large or many[0].numel() > LIMIT
    with on_gpu():
        found = results(many[0], many[1].detach(), many[2].detach(), True)
    del many
    exact = results(x.double().requires_grad_(), dy.double(), residual.double(), False)
    terms = terms_of(name, copies, x, weight, bias, residual, dy)
    errors, halves = norm_errors(terms, DTYPE), halved(terms) if name == "batch" else {}
    for k in ("y", "dx"):
        first = assert_repeats(found[k], copies)
        assert_rounded(k, first, exact[k], errors[k], halves.get(k, 0.0))
    for k in ("dweight", "dbias"):  # sums that are `copies` times as long
        assert_rounded(k, found[k].cpu(), exact[k] * copies, errors[k] * copies)


@SIZE
@LAYOUT
@pytest.mark.parametrize("per_channel", [False, True])
def test_dropout(per_channel: bool, layout: str, large: bool) -> None:
    # The mask of the last image is the reference's at logical indices beyond 2^31.
    sizes, copies = sizes_of(large)
    x = repeated(torch.ones(sizes, dtype=DTYPE), copies, layout)
    seed, op = torch.tensor(DROPOUT_SEED, device=DEVICE), torch.ops.fastcnn.dropout_apply
    with on_gpu(), torch.no_grad():
        y = op(x, None, seed, 0.3, per_channel)
        inplace = x.detach()
        torch.ops.fastcnn.dropout_apply_(inplace, None, seed, 0.3, per_channel)
    assert torch.equal(y, inplace)
    _, c, h, w = x.shape
    for image in (0, len(x) // 2, len(x) - 1):
        shape = (c, 1, 1) if per_channel else (c, h, w)
        count = torch.Size(shape).numel()
        u = draws(DROPOUT_SEED, torch.arange(count).view(shape) + image * count)
        assert torch.equal(y[image].cpu() != 0, (u < threshold(0.3)).expand(c, h, w))


@SIZE
@LAYOUT
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_interpolate(mode: str, layout: str, large: bool) -> None:
    # y beside a skip, and the gradient of its half, which is a slice of channels.
    sizes, copies = sizes_of(large)
    small = sizes[0], sizes[1], sizes[2] // 2, sizes[3] // 2
    draw = Draw(small, DTYPE, layout)
    x, skip = draw.image(), Draw((*small[:2], 2 * small[2], 2 * small[3]), DTYPE, layout).image()
    dy = torch.cat([skip, -skip], 1)

    def results(x: Tensor, skip: Tensor, dy: Tensor) -> list[Tensor]:
        y = interpolate(x, scale_factor=2, mode=mode, concat=skip)
        y.backward(dy)
        assert x.grad is not None
        return [y.detach(), x.grad]

    many = [repeated(t, copies, layout) for t in (x, skip, dy)]
    assert not large or many[2].numel() > LIMIT
    with on_gpu():
        found = results(many[0], many[1].detach(), many[2].detach())
        one = [repeated(t, 1, layout) for t in (x, skip, dy)]
        expected = results(one[0], one[1].detach(), one[2].detach())
    for actual, want in zip(found, expected, strict=True):
        assert torch.equal(assert_repeats(actual, copies), want.cpu())


@SIZE
@LAYOUT
def test_augment(layout: str, large: bool) -> None:
    # A sample's bits do not depend on its batch.
    size = (224, 224) if large else (9, 16)
    n = LIMIT * 51 // 50 // (3 * size[0] * size[1]) if large else 5
    g = seeded(0, DEVICE)
    images = torch.randint(256, (n, 3, 33, 47), dtype=torch.uint8, device=DEVICE, generator=g)
    p = draw_everything(n, (33, 47), size)
    options = {"size": size, "dtype": DTYPE, "memory_format": LAYOUTS[layout]}
    with on_gpu():
        y = augment(images, p, **options)
        for i in (slice(0, 2), slice(n // 2, n // 2 + 2), slice(n - 2, n)):
            assert torch.equal(y[i], augment(images[i], p[i], **options))


@SIZE
@pytest.mark.parametrize("size", [1, 3])
def test_convolutions(size: int, large: bool) -> None:
    sizes, copies = sizes_of(large)
    x, c = Draw(sizes, DTYPE, "channels_last").image(), sizes[1]
    weight = (torch.randn(c, c, size, size) * c**-0.5).to(DTYPE)
    weight = weight.contiguous(memory_format=torch.channels_last).to(DEVICE)
    g = ConvGeometry(padding=(size // 2, size // 2))
    many = repeated(x, copies, "channels_last").detach()
    with on_gpu():
        y, mean, var = conv2d_fused(many, weight, g, Epilogue(statistics=True))
    wide = [t.detach().cpu().double() for t in (x, weight)]
    exact = F.conv2d(*wide, padding=size // 2)
    error = walk(c * size**2, DTYPE) * F.conv2d(*(t.abs() for t in wide), padding=size // 2)
    assert_rounded("y", assert_repeats(y, copies), exact, error)
    # Of the values as they were rounded: as exact as a walk over all of them.
    dims, values = (0, 2, 3), assert_repeats(y, copies).double()
    terms = walk(copies * values[:, 0].numel(), torch.float32)
    exact_var, exact_mean = torch.var_mean(values, dims, correction=0)
    assert_rounded("mean", mean.cpu(), exact_mean, terms * values.abs().mean(dims))
    assert_rounded("var", var.cpu(), exact_var, 4 * terms * values.square().mean(dims))


@SIZE
def test_running_and_dropped_through_the_functions(large: bool) -> None:
    # Evaluation, and dropout with its gradient: the remaining public ways, in one layout each.
    sizes, copies = sizes_of(large)
    draw = Draw(sizes, DTYPE, "channels_last", torch.float32)
    x, stats = draw.image(), [draw.uniform(0.5, 1.5).to(DEVICE) for _ in range(4)]
    many = repeated(x, copies, "channels_last")
    with on_gpu():
        y = batch_norm_act(many, *stats)
        one = batch_norm_act(repeated(x, 1, "channels_last"), *stats)
        assert torch.equal(assert_repeats(y, copies), one.detach().cpu())
        dropped = dropout(many, 0.5)
        dropped.backward(torch.ones_like(many))
    assert many.grad is not None
    kept = many.grad != 0
    assert torch.equal(dropped, torch.where(kept, many * 2, 0))
    for part in (kept, kept[-1]):  # 5.5 deviations of a binomial distribution: 4e-8
        n = part.numel()
        assert abs(int(part.sum()) - n / 2) < 5.5 * n**0.5 / 2
