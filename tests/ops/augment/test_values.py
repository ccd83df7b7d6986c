"""augment against torchvision.transforms.v2.functional, one transform at a time, and their Compose.

On floating images torchvision rounds nothing: within `level_limit`. On uint8 images it rounds after
every operation, geometry to the nearest level and colour down (`to(uint8)`), so that our single
floating result, rounded the same way, may differ by the one level that a rounding within their
operation can make.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.augment_cases import (
    EVERYTHING,
    SIZE,
    clear_of_ties,
    draw_everything,
    level_limit,
    resized,
    smooth_images,
    with_values,
)
from support.oracles import torchvision_transforms as v2
from support.seeds import seeded
from support.shapes import LAYOUTS
from torch import Tensor

from fastcnn import reference
from fastcnn.augment import Augment
from fastcnn.functional import augment

F = v2.functional
BILINEAR, EXACT = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.NEAREST_EXACT
# The case: our parameters, torchvision's call, and how its result on uint8 is rounded.
NEAR, DOWN = torch.round, lambda levels: (levels + 1e-3).floor()
SINGLE: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor], Any]] = {
    "rotate 30": ({"angle": -30}, lambda x: F.rotate(x, 30, BILINEAR), NEAR),
    "rotate 90": ({"angle": -90}, lambda x: F.rotate(x, 90, BILINEAR), NEAR),
    "rotate 180": ({"angle": 180}, lambda x: F.rotate(x, 180, BILINEAR), NEAR),
    "rotate -200.5": ({"angle": 200.5}, lambda x: F.rotate(x, -200.5, BILINEAR), NEAR),
    "translate": (
        {"translate": [7, -5]},
        lambda x: F.affine(x, 0, [7, -5], 1.0, [0.0], BILINEAR), NEAR,
    ),
    "scale up": (
        {"scale": 1.7}, lambda x: F.affine(x, 0, [0, 0], 1.7, [0.0], BILINEAR), NEAR,
    ),
    "scale down": (  # not by 0.4, which samples at halves: ties
        {"scale": 0.43}, lambda x: F.affine(x, 0, [0, 0], 0.43, [0.0], BILINEAR), NEAR,
    ),
    "shear": (
        {"shear": [15, -20]},
        lambda x: F.affine(x, 0, [0, 0], 1.0, [15, -20], BILINEAR), NEAR,
    ),
    "affine": (
        {"angle": 25, "translate": [3, 4], "scale": 1.2, "shear": [-8, 5]},
        lambda x: F.affine(x, 25, [3, 4], 1.2, [-8, 5], BILINEAR), NEAR,
    ),
    "horizontal flip": ({"horizontal_flip": True}, F.hflip, NEAR),
    "vertical flip": ({"vertical_flip": True}, F.vflip, NEAR),
    "crop": ({"crop": [5, 8, *SIZE]}, lambda x: F.crop(x, 5, 8, *SIZE), NEAR),
    # torchvision's uint8 resize rounds between the axes too: the two numbers that the second axis
    # blends are off by up to a half, a quarter in the mean.
    "resized crop": (
        {"crop": [3, 4, 20, 31]},
        lambda x: F.resized_crop(x, 3, 4, 20, 31, list(SIZE), BILINEAR, antialias=False),
        NEAR,
    ),
    "brightness down": ({"brightness": 0.4}, lambda x: F.adjust_brightness(x, 0.4), DOWN),
    "brightness up": ({"brightness": 1.9}, lambda x: F.adjust_brightness(x, 1.9), DOWN),
    # The grey that is blended with is rounded down too: off by up to a level times |1 - factor|.
    "contrast down": ({"contrast": 0.3}, lambda x: F.adjust_contrast(x, 0.3), DOWN),
    "contrast up": ({"contrast": 1.6}, lambda x: F.adjust_contrast(x, 1.6), DOWN),
    "saturation down": ({"saturation": 0.2}, lambda x: F.adjust_saturation(x, 0.2), DOWN),
    "saturation up": ({"saturation": 1.8}, lambda x: F.adjust_saturation(x, 1.8), DOWN),
    # Back from HSV theirs takes the level below 255.999 v, not 255 v: v levels above, and v is a
    # half in the mean.
    "hue": ({"hue": 0.37}, lambda x: F.adjust_hue(x, 0.37), DOWN),
    "hue back": ({"hue": -0.5}, lambda x: F.adjust_hue(x, -0.5), DOWN),
}  # fmt: skip


@pytest.mark.parametrize("c", [3, 1], ids=["rgb", "grey"])
@pytest.mark.parametrize("name", SINGLE)
def test_single_transforms(name: str, c: int) -> None:
    values, torchvision, rounded = SINGLE[name]
    extra = (9, 11) if name == "crop" else (0, 0)
    images = smooth_images(2, c, SIZE[0] + extra[0], SIZE[1] + extra[1])
    p = with_values(2, (images.shape[2], images.shape[3]), **values)
    actual = augment(images, p, size=SIZE)
    assert (actual - torchvision(images.float() / 255)).abs().max() <= 2 * level_limit(images)
    assert (rounded(actual * 255) - torchvision(images).float()).abs().max() <= 1


@pytest.mark.parametrize("fill", [0.0, 90.0])
def test_fill_outside_of_the_image(fill: float) -> None:
    # Away from the border, where torchvision blends its fill twice.
    images = smooth_images(1, 3, *SIZE)
    p = with_values(1, SIZE, angle=-40, scale=0.6)
    theirs = F.affine(images, -40, [0, 0], 0.6, [0.0], BILINEAR, fill=[fill] * 3)
    ones = F.affine(torch.ones(1, 3, *SIZE), -40, [0, 0], 0.6, [0.0], BILINEAR)
    clear = (ones < 1e-4) | (ones > 1 - 1e-4)
    actual = (augment(images, p, fill=fill) * 255).round()
    assert ((actual - theirs.float()).abs() <= 1)[clear].all()
    assert (actual[ones < 1e-4] == fill).all()
    assert (ones < 1e-4).any()


@pytest.mark.parametrize("c", [3, 1], ids=["rgb", "grey"])
def test_compositions_equal_compose_on_floats(c: int) -> None:
    # One interpolation each, so that torchvision's composition interpolates once too.
    size, images = (24, 32), smooth_images(6, c, *SIZE)
    g = seeded(1)
    ranges = {k: v for k, v in EVERYTHING.items() if k not in ("crop_scale", "noise")}
    module = Augment(size, **ranges, mean=0.4, std=0.3, erase_value=0.7)
    p = module.draw(6, SIZE, g)
    actual = module.apply_parameters(images, p)
    for i, x in enumerate(images.float() / 255):
        x = F.affine(
            x,
            float(p.angle[i]),
            p.translate[i].tolist(),
            float(p.scale[i]),
            p.shear[i].tolist(),
            BILINEAR,
        )
        x = F.crop(x, *p.crop[i].tolist())
        x = F.hflip(x) if p.horizontal_flip[i] else x
        x = F.vflip(x) if p.vertical_flip[i] else x
        x = F.adjust_contrast(F.adjust_brightness(x, float(p.brightness[i])), float(p.contrast[i]))
        x = F.adjust_hue(F.adjust_saturation(x, float(p.saturation[i])), float(p.hue[i]))
        x = F.normalize(x, [0.4] * c, [0.3] * c)
        x = F.erase(x, *p.erase[i].tolist(), v=torch.full((c, 1, 1), 0.7))
        assert (actual[i] - x).abs().max() <= 2 * level_limit(images) / 0.3


@pytest.mark.every_level
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [3, 1], ids=["rgb", "grey"])
def test_everything_against_the_reference(c: int, layout: str) -> None:
    for images, p, size, options in resized(c, LAYOUTS[layout]):
        actual = augment(images, p, size=size, **options, memory_format=LAYOUTS[layout])
        expected = reference.augment(images, p, size, **options)
        assert actual.is_contiguous(memory_format=LAYOUTS[layout])
        assert (actual - expected).abs().max() <= 2 * level_limit(images, 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_float32_rounded(dtype: torch.dtype) -> None:
    images, p = smooth_images(4, 3, *SIZE), draw_everything(4, SIZE, (21, 35))
    for layout in LAYOUTS.values():
        full = augment(images, p, size=(21, 35), memory_format=layout)
        half = augment(images, p, size=(21, 35), memory_format=layout, dtype=dtype)
        assert torch.equal(half, full.to(dtype))


@pytest.mark.every_level
def test_one_sample_s_bits_do_not_depend_on_layout_batch_or_threads() -> None:
    images, p = smooth_images(7, 3, *SIZE), draw_everything(7, SIZE, (29, 31))
    first = augment(images, p, size=(29, 31))
    for fmt in LAYOUTS.values():
        assert torch.equal(augment(images.contiguous(memory_format=fmt), p, size=(29, 31)), first)
        assert torch.equal(augment(images, p, size=(29, 31), memory_format=fmt), first)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.equal(augment(images[order], p[order], size=(29, 31)), first[order])
    large = smooth_images(70, 3, 40, 40)  # whole samples as tasks: the other way through the kernel
    q = draw_everything(70, (40, 40), (64, 64))
    many = augment(large, q, size=(64, 64))
    for i in (0, 33, 69):
        assert torch.equal(augment(large[i : i + 1], q[i], size=(64, 64))[0], many[i])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(augment(images, p, size=(29, 31)), first)
            assert torch.equal(augment(large, q, size=(64, 64)), many)
    finally:
        torch.set_num_threads(threads)


def test_noise_is_normal_and_its_seed_s() -> None:
    # 3 * 2^16 draws: mean, variance and fourth moment within five of their standard errors;
    # channels and neighbours independent; nothing in common between seeds. The seeds are fixed, so
    # that these are the same draws in every run.
    images = torch.full((2, 3, 256, 256), 128, dtype=torch.uint8)
    p = with_values(2, (256, 256), noise=0.05)
    p = dataclasses.replace(p, noise_seed=torch.tensor([5, -(2**62)]))
    z = (augment(images, p).double() - 128 / 255) / 0.05
    count = z[0].numel()
    for sample in z:
        assert sample.mean().abs() < 5 / count**0.5
        assert (sample.var() - 1).abs() < 5 * (2 / count) ** 0.5
        assert ((sample**4).mean() - 3).abs() < 5 * (96 / count) ** 0.5
    rows = torch.cat([z.flatten(2).flatten(0, 1), z[:1, 0].roll(1, 1).flatten(1)])
    other = torch.corrcoef(rows) - torch.eye(7)
    assert other.abs().max() < 5 / 2**8


MASKS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "rotate": ({"angle": -33}, lambda m: F.rotate(m, 33, fill=[255.0])),
    "affine": (
        {"angle": 12, "translate": [5, -3], "scale": 0.8, "shear": [7, 3]},
        lambda m: F.affine(m, 12, [5, -3], 0.8, [7, 3], fill=[255.0]),
    ),
    "flips": (
        {"horizontal_flip": True, "vertical_flip": True},
        lambda m: F.hflip(F.vflip(m)),
    ),
    "resized crop": (
        # Odd: of 20 rows the middle one of SIZE lies between two.
        {"crop": [3, 4, 21, 31]},
        lambda m: F.resized_crop(m, 3, 4, 21, 31, list(SIZE), EXACT),
    ),
}


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_follow_as_torchvision_s(name: str, dtype: torch.dtype) -> None:
    values, torchvision = MASKS[name]
    images, labels = smooth_images(2, 3, *SIZE), torch.randint(0, 200, (2, *SIZE)).to(dtype)
    # Erasing and colour leave masks alone.
    p = with_values(2, SIZE, **values, erase=[0, 0, 9, 9], hue=0.2)
    followed = augment(images, p, masks=labels)[1]
    expected = torchvision(labels[:, None].to(torch.uint8))[:, 0].to(dtype)
    assert clear_of_ties(p, SIZE, SIZE).all()
    assert torch.equal(followed, expected)
    with_channel = augment(images, p, masks=labels[:, None])[1]
    assert torch.equal(with_channel, followed[:, None])


def test_a_mask_and_an_image_of_the_same_content_stay_together() -> None:
    # Two halves: where the image is clearly of one, the mask is.
    labels = torch.zeros(4, *SIZE, dtype=torch.uint8)
    labels[:, :, 25:] = 1
    p = dataclasses.replace(
        draw_everything(4, SIZE, SIZE),
        erase=torch.zeros(4, 4, dtype=torch.int64),
        contrast=torch.ones(4),
        brightness=torch.ones(4),
        noise=torch.zeros(4),
    )
    image, mask = augment(labels[:, None] * 255, p, masks=labels, mask_fill=0)
    assert torch.equal((image[:, 0] > 0.51) & (mask == 0), torch.zeros(4, *SIZE).bool())
    assert torch.equal((image[:, 0] < 0.49) & (mask == 1) & (image[:, 0] > 0), mask > 1)


def test_empty_batches() -> None:
    images = smooth_images(3, 3, 8, 9)
    p = draw_everything(3, (8, 9), (5, 6))
    y, m = augment(images[:0], p[:0], masks=torch.zeros(0, 8, 9).long(), size=(5, 6))
    assert y.shape == (0, 3, 5, 6)
    assert m.shape == (0, 5, 6)
