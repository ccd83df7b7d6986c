"""From ranges to parameters: each sample's own, from a seed and the sample's key alone."""

import math

import torch
from torch import Tensor

from fastcnn.augment.ranges import Range, Ranges
from fastcnn.augment.stream import words
from fastcnn.ops.augment_parameters import AugmentParameters

Size = tuple[int, int]
_ATTEMPTS = 10  # as torchvision's RandomResizedCrop and RandomErasing

# A sample's words, in this order. Each transform has words of its own, used or not: switching one
# on or off changes nothing in the others.
_SLOTS = {
    "angle": 1, "translate": 2, "scale": 1, "shear": 2, "flips": 2, "brightness": 1, "contrast": 1,
    "saturation": 1, "hue": 1, "noise": 1, "noise_seed": 2, "erasing": 1, "crop_place": 2,
    "crop": 2 * _ATTEMPTS, "erase_place": 2, "erase": 2 * _ATTEMPTS,
}  # fmt: skip


class _Draws:
    """Uniform numbers in [0, 1) by slot, float64 [n, width of the slot]."""

    def __init__(self, seed: int, keys: Tensor) -> None:
        self._words = dict(
            zip(
                _SLOTS,
                words(seed, keys, sum(_SLOTS.values())).split(list(_SLOTS.values()), 1),
                strict=True,
            )
        )

    def unit(self, slot: str) -> Tensor:
        return self._words[slot] * 2.0**-32

    def within(self, slot: str, limits: Range) -> Tensor:
        """[n] float32 between the limits."""
        u = self.unit(slot)[:, 0]
        return (limits[0] + (limits[1] - limits[0]) * u).clamp(*limits).float()

    def word(self, slot: str) -> Tensor:
        """[n] int64 of two words."""
        high, low = self._words[slot].unbind(1)
        return (high << 32) | low


def _boxes(u: Tensor, area: int, scale: Range, ratio: Range) -> tuple[Tensor, Tensor]:
    """Sides of attempts, [n, attempts] each: of sqrt(area * ratio) and sqrt(area / ratio)."""
    areas = area * (scale[0] + (scale[1] - scale[0]) * u[:, :_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = (low + (high - low) * u[:, _ATTEMPTS:]).exp()
    return (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()


def _first(fits: Tensor, *sides: Tensor) -> list[Tensor]:
    """Of each row the sides of the first attempt that fits; 0 where none does."""
    found = fits.any(1)
    index = fits.byte().argmax(1, keepdim=True)
    return [torch.where(found, side.gather(1, index)[:, 0], 0) for side in sides]


def _place(u: Tensor, free: Tensor) -> Tensor:
    """A whole number from 0 to `free`, included."""
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


def _crops(draws: _Draws, ranges: Ranges, n: int, size_in: Size, size: Size) -> Tensor:
    (h_in, w_in), (h, w) = size_in, size
    place = draws.unit("crop_place")
    if ranges.crop_scale is None:
        heights, widths = torch.tensor([h, w]).repeat(n, 1).unbind(1)
    else:
        u = draws.unit("crop")
        wide, high = _boxes(u, h_in * w_in, ranges.crop_scale, ranges.crop_ratio)
        fits = (wide > 0) & (wide <= w_in) & (high > 0) & (high <= h_in)
        heights, widths = _first(fits, high, wide)
    tops = _place(place[:, 0], h_in - heights)
    lefts = _place(place[:, 1], w_in - widths)
    crops = torch.stack([tops, lefts, heights, widths], 1)
    return torch.where(heights[:, None] > 0, crops, _last_resort(ranges.crop_ratio, size_in))


def _last_resort(ratio: Range, size_in: Size) -> Tensor:
    """Where no attempt fits: in the centre the largest box, of the range's nearest ratio."""
    h_in, w_in = size_in
    h = round(w_in / ratio[0]) if w_in / h_in < ratio[0] else h_in
    w = round(h_in * ratio[1]) if w_in / h_in > ratio[1] else w_in
    h, w = max(1, min(h, h_in)), max(1, min(w, w_in))
    return torch.tensor([(h_in - h) // 2, (w_in - w) // 2, h, w])


def _erased(draws: _Draws, ranges: Ranges, size: Size) -> Tensor:
    h, w = size
    high, wide = _boxes(draws.unit("erase"), h * w, ranges.erasing_scale, ranges.erasing_ratio)
    heights, widths = _first((high < h) & (wide < w), high, wide)
    place = draws.unit("erase_place")
    tops, lefts = _place(place[:, 0], h - heights), _place(place[:, 1], w - widths)
    erased = draws.unit("erasing") < ranges.erasing
    return torch.where(erased, torch.stack([tops, lefts, heights, widths], 1), 0)


def draw(ranges: Ranges, seed: int, keys: Tensor, size_in: Size, size: Size) -> AugmentParameters:
    """Draw the parameters of the samples with these keys (int64 [n])."""
    draws, n = _Draws(seed, keys), keys.shape[0]
    shear = [
        limits[0] + (limits[1] - limits[0]) * draws.unit("shear")[:, i]
        for i, limits in enumerate((ranges.shear_x, ranges.shear_y))
    ]
    most = torch.tensor([ranges.translate[0] * size_in[1], ranges.translate[1] * size_in[0]])
    flips = draws.unit("flips")
    return AugmentParameters(
        angle=draws.within("angle", ranges.degrees),
        # Whole pixels, as torchvision's RandomAffine.
        translate=((2 * draws.unit("translate") - 1) * most).round().float(),
        scale=draws.within("scale", ranges.scale),
        shear=torch.stack(shear, 1).float(),
        crop=_crops(draws, ranges, n, size_in, size),
        horizontal_flip=flips[:, 0] < ranges.horizontal_flip,
        vertical_flip=flips[:, 1] < ranges.vertical_flip,
        brightness=draws.within("brightness", ranges.brightness),
        contrast=draws.within("contrast", ranges.contrast),
        saturation=draws.within("saturation", ranges.saturation),
        hue=draws.within("hue", ranges.hue),
        noise=draws.within("noise", ranges.noise),
        noise_seed=draws.word("noise_seed"),
        erase=_erased(draws, ranges, size),
    )
