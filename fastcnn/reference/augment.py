"""augment in elementary PyTorch operations, in float64: forward only, as the operator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.common.philox import words
from fastcnn.ops.augment.parameters import AugmentParameters

Numbers = float | Sequence[float]


def _affine(p: AugmentParameters, h: int, w: int) -> Tensor:
    """From output to input, [n, 3, 3]: translate @ rotate @ scale @ shear, inverted."""

    def matrix(*entries: Tensor | float) -> Tensor:
        rows = [
            torch.as_tensor(e, dtype=torch.float64, device=p.angle.device).expand(len(p))
            for e in entries
        ]
        return torch.stack(rows, 1).reshape(-1, 3, 3)

    a, shear = p.angle.double().deg2rad(), p.shear.double().deg2rad().tan()
    s, (tx, ty) = p.scale.double(), p.translate.double().unbind(1)
    cx, cy = (w - 1) / 2, (h - 1) / 2
    forward = (
        matrix(1, 0, tx + cx, 0, 1, ty + cy, 0, 0, 1)
        @ matrix(a.cos() * s, -a.sin() * s, 0, a.sin() * s, a.cos() * s, 0, 0, 0, 1)
        @ matrix(1, 0, 0, -shear[:, 1], 1, 0, 0, 0, 1)
        @ matrix(1, -shear[:, 0], 0, 0, 1, 0, 0, 0, 1)
        @ matrix(1, 0, -cx, 0, 1, -cy, 0, 0, 1)
    )
    return torch.linalg.inv(forward)


def coordinates(
    p: AugmentParameters, size_in: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return x and y in the source, [n, h, w], of each pixel of the output."""
    top, left, crop_h, crop_w = p.crop.double().unbind(1)

    def cropped(out: int, start: Tensor, length: Tensor, flip: Tensor) -> Tensor:
        at = torch.arange(out, dtype=torch.float64, device=start.device).expand(len(p), out)
        at = torch.where(flip[:, None], at.flip(1), at)
        scaled = (at + 0.5) * (length / out)[:, None] - 0.5
        return start[:, None] + scaled.clamp(min=0).minimum(length[:, None] - 1)

    x = cropped(size[1], left, crop_w, p.horizontal_flip)[:, None].expand(-1, *size)
    y = cropped(size[0], top, crop_h, p.vertical_flip)[:, :, None].expand(-1, *size)
    points = torch.stack([x, y, torch.ones_like(x)], 1).flatten(2)
    moved = (_affine(p, *size_in) @ points).reshape(len(p), 3, *size)
    return moved[:, 0], moved[:, 1]


def _look_up(images: Tensor, x: Tensor, y: Tensor, fill: Tensor) -> Tensor:
    """Images [n, c, h, w] at whole x and y [n, h', w'], fill [c] outside."""
    h, w = images.shape[2:]
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    flat = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).long().flatten(1)
    values = images.flatten(2).gather(2, flat[:, None].expand(-1, images.shape[1], -1))
    return torch.where(
        inside[:, None], values.reshape(*images.shape[:2], *x.shape[1:]), fill[:, None, None]
    )


def masks(masks: Tensor, x: Tensor, y: Tensor, fill: int) -> Tensor:
    """Return masks [n, h, w] at the nearest places, halves rounded up."""
    filled = masks.new_tensor([fill])
    return _look_up(masks[:, None], (x + 0.5).floor(), (y + 0.5).floor(), filled)[:, 0]


def _hue(level: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of levels [n, 3, h, w] from 0 to 1, by way of HSV."""
    high, low = level.amax(1), level.amin(1)
    span = torch.where(high > low, high - low, 1.0)
    r, g, b = level.unbind(1)
    sixth = torch.where(high == g, 2 + (b - r) / span, 4 + (r - g) / span)
    sixth = torch.where(high == r, (g - b) / span, sixth)
    hue = (sixth / 6 + turns[:, None, None]) % 1
    # f(n) = value - value * saturation * max(0, min(k, 4 - k, 1)), k = (n + hue / 60 deg) mod 6
    k = (level.new_tensor([5, 3, 1])[:, None, None] + 6 * hue[:, None]) % 6
    return high[:, None] - (high - low)[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def normals(seed: int, c: int, h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
    """Return normal numbers [c, h, w] of one sample: Box and Muller's from the pixels' words."""
    found = words(seed, torch.arange(h * w, device=device), 4)
    u = 1 - (found[:, 0::2] >> 9) * 2.0**-23
    # 25 bits of the angle: the quadrant, and 23 below, around the quadrant's start.
    quarters = (found[:, 1::2] >> 7) * 2.0**-23 - 0.5
    radius, angle = (-2 * u.double().log()).sqrt(), quarters.double() * (math.pi / 2)
    numbers = torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1)
    return numbers[:, :c].T.reshape(c, h, w)


def augment(
    images: Tensor,
    p: AugmentParameters,
    size: tuple[int, int] | None = None,
    mean: Numbers = 0.0,
    std: Numbers = 1.0,
    fill: Numbers = 0.0,
    erase_value: Numbers = 0.0,
) -> Tensor:
    """Return y in float64 for images [n, c, h, w]."""
    n, c, h, w = images.shape
    size = (h, w) if size is None else size

    def channels(value: Numbers) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=images.device).expand(c)

    def column(t: Tensor) -> Tensor:
        return t.double()[:, None, None, None]

    def gray(level: Tensor) -> Tensor:
        if c == 1:
            return level
        r, g, b = level.split(1, 1)
        return 0.2989 * r + 0.587 * g + 0.114 * b

    def blend(level: Tensor, towards: Tensor | float, factor: Tensor) -> Tensor:
        return (level * factor + towards * (1 - factor)).clamp(0, 1)

    x, y = coordinates(p, (h, w), size)
    level = images.new_zeros(n, c, *size, dtype=torch.float64)
    for dx in (0, 1):
        for dy in (0, 1):
            near_x, near_y = x.floor() + dx, y.floor() + dy
            weight = (1 - (x - near_x).abs()) * (1 - (y - near_y).abs())
            level += weight[:, None] * _look_up(images.double(), near_x, near_y, channels(fill))
    level = blend(level / 255, 0.0, column(p.brightness))
    towards = gray(level).mean((1, 2, 3), keepdim=True)
    level = torch.where(column(p.contrast) == 1, level, blend(level, towards, column(p.contrast)))
    if c == 3:
        level = blend(level, gray(level), column(p.saturation))
        level = _hue(level, p.hue.double())
    for i in range(n):
        if p.noise[i] != 0:
            noise = normals(int(p.noise_seed[i]), c, *size, images.device) * p.noise[i].double()
            level[i] = (level[i] + noise).clamp(0, 1)
    out = (level - channels(mean)[:, None, None]) / channels(std)[:, None, None]
    for i, (top, left, height, width) in enumerate(p.erase.tolist()):
        out[i, :, top : top + height, left : left + width] = channels(erase_value)[:, None, None]
    return out
