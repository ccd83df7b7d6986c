"""From ranges to parameters: each sample's own, from a seed and the sample's key alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.augment.ranges import Range, Ranges
from fastcnn.common.philox import words
from fastcnn.ops.augment.parameters import AugmentParameters

Size = tuple[int, int]
_ATTEMPTS = 10  # as torchvision's RandomResizedCrop and RandomErasing

# A sample's words, in this order. Each transform has words of its own, used or not: switching one
# on or off changes nothing in the others. The last are many, and made only where they are asked
# for: where a range draws a crop's size, or erases.
_UNIFORM = {
    "angle": 1, "translate": 2, "scale": 1, "shear": 2, "flips": 2, "brightness": 1, "contrast": 1,
    "saturation": 1, "hue": 1, "noise": 1,
}  # fmt: skip
_SLOTS = {
    **_UNIFORM, "noise_seed": 2, "erasing": 1, "crop_place": 2, "crop": 2 * _ATTEMPTS,
    "erase_place": 2, "erase": 2 * _ATTEMPTS,
}  # fmt: skip


def _words(ranges: Ranges, seed: int | Tensor, keys: Tensor) -> dict[str, Tensor]:
    """The words by slot, int64 [width of the slot, n], down to the last slot that is drawn from."""
    names = list(_SLOTS)
    last = "erase" if ranges.erasing > 0 else "crop_place" if ranges.crop_scale is None else "crop"
    slots = names[: names.index(last) + 1]
    widths = [_SLOTS[name] for name in slots]
    return dict(zip(slots, words(seed, keys, sum(widths)).t().split(widths), strict=True))


def _unit(word: Tensor) -> Tensor:
    return word.double() * 2.0**-32  # exactly, so below 1; float32 would round up to it


def _uniform(word: Sequence[Tensor], limits: Sequence[Range]) -> Tensor:
    """Numbers between the limits, float64 [len(limits), n]: all slots at once."""
    u = _unit(torch.cat(tuple(word)))
    low, high = torch.tensor(limits, dtype=torch.float64, device=u.device).t()[:, :, None]
    return (low + (high - low) * u).clamp(low, high)


def _boxes(u: Tensor, area: int, scale: Range, ratio: Range) -> tuple[Tensor, Tensor]:
    """Sides of attempts, [attempts, n] each: of sqrt(area * ratio) and sqrt(area / ratio)."""
    areas = area * (scale[0] + (scale[1] - scale[0]) * u[:_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = (low + (high - low) * u[_ATTEMPTS:]).exp()
    return (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()


def _first(fits: Tensor, *sides: Tensor) -> list[Tensor]:
    """Of each sample the sides of the first attempt that fits; 0 where none does."""
    found = fits.any(0)
    index = fits.byte().argmax(0, keepdim=True)
    return [torch.where(found, side.gather(0, index)[0], 0) for side in sides]


def _place(u: Tensor, free: Tensor | int) -> Tensor:
    """An integer from 0 to `free`, included."""
    return (u * (free + 1)).long()


def center_crop(ranges: Ranges, size_in: Size, size: Size) -> list[int]:
    """Top, left, height and width of what evaluation sees.

    CenterCrop(size); beside RandomResizedCrop the largest centred box with size's aspect ratio.
    """
    (h_in, w_in), (h, w) = size_in, size
    if ranges.crop_scale is not None:
        ratio = min(h_in / h, w_in / w)
        h, w = max(1, min(h_in, round(h * ratio))), max(1, min(w_in, round(w * ratio)))
    # As torchvision: halves to the nearest even.
    return [round((h_in - h) / 2.0), round((w_in - w) / 2.0), h, w]


def _crops(word: dict[str, Tensor], ranges: Ranges, size_in: Size, size: Size) -> Tensor:
    (h_in, w_in), (h, w) = size_in, size
    top, left = _unit(word["crop_place"]).unbind()
    if ranges.crop_scale is None:
        tops, lefts = _place(top, h_in - h), _place(left, w_in - w)
        return torch.stack([tops, lefts, torch.full_like(tops, h), torch.full_like(tops, w)], 1)
    u = _unit(word["crop"])
    wide, high = _boxes(u, h_in * w_in, ranges.crop_scale, ranges.crop_ratio)
    fits = (wide > 0) & (wide <= w_in) & (high > 0) & (high <= h_in)
    heights, widths = _first(fits, high, wide)
    tops, lefts = _place(top, h_in - heights), _place(left, w_in - widths)
    crops = torch.stack([tops, lefts, heights, widths], 1)
    return torch.where(
        heights[:, None] > 0, crops, crops.new_tensor(_last_resort(ranges.crop_ratio, size_in))
    )


def _last_resort(ratio: Range, size_in: Size) -> list[int]:
    """Where no attempt fits: in the centre the largest box, of the range's nearest ratio."""
    h_in, w_in = size_in
    h = round(w_in / ratio[0]) if w_in / h_in < ratio[0] else h_in
    w = round(h_in * ratio[1]) if w_in / h_in > ratio[1] else w_in
    h, w = max(1, min(h, h_in)), max(1, min(w, w_in))
    return [(h_in - h) // 2, (w_in - w) // 2, h, w]


def _erased(word: dict[str, Tensor], ranges: Ranges, n: int, size: Size) -> Tensor:
    if ranges.erasing == 0:
        return word["angle"].new_zeros(n, 4)
    h, w = size
    high, wide = _boxes(_unit(word["erase"]), h * w, ranges.erasing_scale, ranges.erasing_ratio)
    heights, widths = _first((high < h) & (wide < w), high, wide)
    top, left = _unit(word["erase_place"]).unbind()
    tops, lefts = _place(top, h - heights), _place(left, w - widths)
    erased = _unit(word["erasing"]) < ranges.erasing
    return torch.where(erased, torch.stack([tops, lefts, heights, widths]), 0).t()


def draw(
    ranges: Ranges, seed: int | Tensor, keys: Tensor, size_in: Size, size: Size
) -> AugmentParameters:
    """Draw the parameters of the samples with these keys (int64 [n])."""
    word = _words(ranges, seed, keys)
    right, down = ranges.translate[0] * size_in[1], ranges.translate[1] * size_in[0]
    limits = [
        ranges.degrees, (-right, right), (-down, down), ranges.scale, ranges.shear_x,
        ranges.shear_y, (0.0, 1.0), (0.0, 1.0), ranges.brightness, ranges.contrast,
        ranges.saturation, ranges.hue, ranges.noise,
    ]  # fmt: skip
    drawn = _uniform([word[name] for name in _UNIFORM], limits)
    angle, _, _, scale, _, _, _, _, brightness, contrast, saturation, hue, noise = drawn.float()
    high, low = word["noise_seed"].unbind()
    return AugmentParameters(
        angle=angle,
        translate=drawn[1:3].round().float().t(),  # whole pixels, as torchvision's RandomAffine
        scale=scale,
        shear=drawn[4:6].float().t(),
        crop=_crops(word, ranges, size_in, size),
        horizontal_flip=drawn[6] < ranges.horizontal_flip,
        vertical_flip=drawn[7] < ranges.vertical_flip,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        noise=noise,
        noise_seed=(high << 32) | low,
        erase=_erased(word, ranges, keys.shape[0], size),
        check_values=False,
    )
