"""AugmentParameters as the kernels take them: csrc/augment.h has the rows' columns."""

import torch
from torch import Tensor

from fastcnn.ops.augment.parameters import AugmentParameters

TOP_LEVEL = 255.0


def pack(
    p: AugmentParameters, size_in: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return reals and integers of a batch, computed in float64."""
    top, left, crop_h, crop_w = p.crop.double().unbind(1)

    def to_crop(flip: Tensor, length: Tensor, out: int) -> list[Tensor]:
        # Pixels are squares: their centres lie at halves, and flipping mirrors them.
        ratio = length / out
        step = torch.where(flip, -ratio, ratio)
        return [step, torch.where(flip, out - 0.5, 0.5) * ratio - 0.5, length - 1]

    # The inverse of translate * rotate * scale * shear, around the image's centre.
    angle, (shear_x, shear_y) = p.angle.double().deg2rad(), p.shear.double().deg2rad().unbind(1)
    translate_x, translate_y = p.translate.double().unbind(1)
    scale = p.scale.double()
    turned, shrunk, slope = angle - shear_y, shear_y.cos(), shear_x.tan()
    a, c = turned.cos() / shrunk, turned.sin() / shrunk
    b, d = -(a * slope + angle.sin()), angle.cos() - c * slope
    xu, xv, yu, yv = d / scale, -b / scale, -c / scale, a / scale
    center_x, center_y = (size_in[1] - 1) / 2, (size_in[0] - 1) / 2
    from_x, from_y = left - center_x - translate_x, top - center_y - translate_y
    x0, y0 = xu * from_x + xv * from_y + center_x, yu * from_x + yv * from_y + center_y
    columns = [
        *to_crop(p.horizontal_flip, crop_w, size[1]), *to_crop(p.vertical_flip, crop_h, size[0]),
        xu, xv, x0, yu, yv, y0, p.brightness, p.contrast, p.saturation, p.hue, p.noise * TOP_LEVEL,
    ]  # fmt: skip
    corner, extent = p.erase[:, :2], p.erase[:, 2:]
    integers = torch.cat([corner, corner + extent, p.noise_seed[:, None]], 1)
    return torch.stack(columns, 1).float(), integers  # stacked as float64, which holds float32
