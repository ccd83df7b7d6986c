"""The CUDA kernels of augment, run by the emulator, against the reference in float64.

Limits: the reference computes from the same parameters, so what differs is float32's rounding of
coordinates (a few thousandths of a pixel at most here, times the step between two neighbours, up to
255 levels), of the hue's division, and the output type's own.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from cuda_emu.run import DTYPE_NUMBER, Case, run_cases
from support.augment_cases import draw_everything, level_limit, smooth_images
from torch import Tensor

from fastcnn import reference
from fastcnn.functional import AugmentParameters
from fastcnn.ops.augment.pack import pack
from fastcnn.reference.augment import coordinates, masks as reference_masks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INVALID_VALUE = 1  # cudaErrorInvalidValue
# n, c, h_in, w_in, h, w. A thread has 16 bytes of an output row: 4 or 8 pixels.
SIZES = [
    (2, 3, 9, 11, 8, 16),  # whole vectors
    (3, 3, 7, 5, 5, 7),  # single elements
    (2, 1, 6, 8, 9, 8),  # grey
    (1, 3, 1, 1, 3, 8),  # one pixel: it has no neighbour
    (2, 1, 1, 7, 4, 5),  # one row, one column of it beyond whole words
    (1, 3, 9, 1, 8, 8),
    (1, 3, 40, 50, 67, 64),  # several blocks; gray's threads walk more than once
]


def channels(c: int) -> Tensor:
    """Scale, shift, fill and erased: all channels different."""
    rows = [[1 / (255 * (0.2 + 0.1 * j)), -0.5 - j, 40.0 * j, 0.25 * j] for j in range(c)]
    return torch.tensor(rows)


def image_case(
    images: Tensor, p: AugmentParameters, size: tuple[int, int], dtype: torch.dtype,
    in_last: bool, last: bool, skip: int = 0,
) -> Case:  # fmt: skip
    n, c, h_in, w_in = images.shape
    reals, integers = pack(p, (h_in, w_in), size)
    numbers = {
        "n": n, "c": c, "h_in": h_in, "w_in": w_in, "h": size[0], "w": size[1], "sm_count": 3,
        "in_channels_last": int(in_last), "channels_last": int(last), "dtype": DTYPE_NUMBER[dtype],
    }  # fmt: skip
    inputs = {
        "images": images.permute(0, 2, 3, 1).contiguous() if in_last else images,
        "reals": reals,
        "integers": integers,
        "channels": channels(c),
    }
    sizes = (n, *size, c) if last else (n, c, *size)
    y = torch.empty(sizes, dtype=dtype)
    return Case("augment", numbers, inputs, {"y": y}, skip={"y": skip, "images": skip})


def expected(images: Tensor, p: AugmentParameters, size: tuple[int, int]) -> Tensor:
    table = channels(images.shape[1]).double()
    std, fill = 1 / (255 * table[:, 0]), table[:, 2].tolist()
    mean, erased = (-table[:, 1] * std).tolist(), table[:, 3].tolist()
    return reference.augment(images, p, size, mean, std.tolist(), fill, erased)


def check(case: Case, y: Tensor, want: Tensor) -> None:
    y = y.permute(0, 3, 1, 2) if case.numbers["channels_last"] else y
    scale = case.inputs["channels"][:, 0].double().max().item()
    # Scaled and shifted in float32: the factor, the product and the sum are rounded.
    limit = 255 * scale * level_limit(case.inputs["images"])
    rounding = torch.finfo(y.dtype).eps + 3 * torch.finfo(torch.float32).eps
    limit += rounding * want.abs().max().item()
    assert (y.double() - want).abs().max().item() <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_and_layout(dtype: torch.dtype) -> None:
    cases, wanted = [], []
    for n, c, h_in, w_in, h, w in SIZES:
        images = smooth_images(n, c, h_in, w_in)
        p = draw_everything(n, (h_in, w_in), (h, w))
        for in_last, last in itertools.product([False, True], repeat=2):
            cases.append(image_case(images, p, (h, w), dtype, in_last, last))
            wanted.append(expected(images, p, (h, w)))
    for case, result, want in zip(cases, run_cases("augment", cases), wanted, strict=True):
        assert result.error == 0
        check(case, result.tensors["y"], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    # An output off a 16-byte address: UBSan ends the run at a misaligned vector.
    images, p = smooth_images(2, 3, 8, 8), draw_everything(2, (8, 8), (8, 8))
    cases = [image_case(images, p, (8, 8), dtype, last, last, skip=1) for last in (False, True)]
    for case, result in zip(cases, run_cases("augment", cases), strict=True):
        check(case, result.tensors["y"], expected(images, p, (8, 8)))


def test_samples_without_contrast_beside_some_with() -> None:
    # The first kernel leaves nothing for those; the second must not look.
    images, p = smooth_images(3, 3, 9, 8), draw_everything(3, (9, 8), (9, 8))
    p = replace(p, contrast=torch.tensor([1.0, 0.3, 1.0]))
    case = image_case(images, p, (9, 8), torch.float32, False, False)
    result = run_cases("augment", [case])[0]
    check(case, result.tensors["y"], expected(images, p, (9, 8)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_masks(dtype: torch.dtype) -> None:
    cases, wanted = [], []
    for n, _, h_in, w_in, h, w in SIZES:
        labels = torch.randint(200, (n, h_in, w_in)).to(dtype)
        p = draw_everything(n, (h_in, w_in), (h, w))
        numbers = {
            "n": n, "h_in": h_in, "w_in": w_in, "h": h, "w": w, "sm_count": 3, "fill": 255,
            "wide": int(dtype is torch.int64),
        }  # fmt: skip
        inputs = {"masks": labels, "reals": pack(p, (h_in, w_in), (h, w))[0]}
        y = torch.empty(n, h, w, dtype=dtype)
        cases.append(Case("mask", numbers, inputs, {"y": y}))
        wanted.append(reference_masks(labels, *coordinates(p, (h_in, w_in), (h, w)), 255))
    for result, want in zip(run_cases("augment", cases), wanted, strict=True):
        assert torch.equal(result.tensors["y"], want)
