"""augment: the operators, what they return, and the numbers that the kernels are given.

    y(o) = normalise(noise(hue(saturation(contrast(brightness(image(affine(crop(flip(o)))))))))

for each pixel o of the output, and a constant within the erased rectangle. images: [n, c, h_in,
w_in], uint8; y: [n, c, h, w]; masks: [n, h_in, w_in], which follow the geometry alone.

The kernels get one row a sample: `reals` [n, 17] (struct AugmentSample of csrc/augment.h: the
geometry as two maps, from the output to the crop and from the crop to the source, then colour and
noise), `integers` [n, 5] (the erased rectangle's edges and the noise's seed), and one row a
channel: `channels` [c, 4] (scale, shift, fill, erased).

Data movement: what of the images is seen is read once, and once more where contrast changes; y is
written once. Not differentiable: the images are uint8. Nothing is saved for backward.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.common.checks import check_device, memory_format_of
from fastcnn.common.library import declare
from fastcnn.ops.augment.pack import TOP_LEVEL, pack
from fastcnn.ops.augment.parameters import AugmentParameters

OP = "augment"
# The numbers of DType in csrc/common/types.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGEST_SIDE = 2**24  # a float32 holds every integer up to here


def _augment_fake(
    images: Tensor, reals: Tensor, integers: Tensor, channels: Tensor, h: int, w: int, dtype: int,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    return torch.empty(
        (images.shape[0], images.shape[1], h, w),
        dtype=list(DTYPES)[dtype],
        device=images.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _mask_fake(masks: Tensor, reals: Tensor, h: int, w: int, fill: int) -> Tensor:
    return masks.new_empty((masks.shape[0], h, w))


declare(
    "augment(Tensor images, Tensor reals, Tensor integers, Tensor channels, SymInt h, SymInt w, "
    "int dtype, bool channels_last) -> Tensor",
    _augment_fake,
)
declare(
    "augment_mask(Tensor masks, Tensor reals, SymInt h, SymInt w, int fill) -> Tensor", _mask_fake
)

_augment = torch.ops.fastcnn.augment.default
_augment_mask = torch.ops.fastcnn.augment_mask.default


def per_channel(name: str, value: float | Sequence[float], c: int) -> list[float]:
    """Return a number for each channel of one for all or one each; all must be finite."""
    numbers = [value] * c if isinstance(value, (int, float)) else list(value)
    if len(numbers) == 1:
        numbers *= c
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError(f"{OP}: {name}: expected numbers, got {value!r}")
    # Compared, since torch.compile makes symbols of numbers, which math.isfinite does not take.
    if len(numbers) != c or not all(-math.inf < number < math.inf for number in numbers):
        raise ValueError(f"{OP}: {name}: expected 1 or {c} finite numbers, got {value!r}")
    return [float(number) for number in numbers]


def check_size(op: str, name: str, size: Sequence[int]) -> tuple[int, int]:
    """Return a height and width as a tuple."""
    if not isinstance(size, Sequence) or not all(isinstance(side, int) for side in size):
        raise TypeError(f"{op}: {name}: expected a height and a width, got {size!r}")
    if len(size) != 2 or not all(1 <= side <= LARGEST_SIDE for side in size):
        raise ValueError(
            f"{op}: {name}: expected a height and a width from 1 to {LARGEST_SIDE}, got {size!r}"
        )
    return size[0], size[1]


def check_images(images: Tensor) -> None:
    """Check a dense batch of uint8 images [n, c, h, w] with 1 or 3 channels."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{OP}: images: expected a Tensor, got {type(images).__name__}")
    if images.dtype is not torch.uint8:
        raise TypeError(f"{OP}: images: expected uint8, got {images.dtype}")
    sizes = list(images.shape)
    if images.dim() != 4:
        raise ValueError(
            f"{OP}: images: expected 4 dimensions [n, c, h, w], got {len(sizes)}: {sizes}"
        )
    if sizes[1] not in (1, 3):
        raise ValueError(f"{OP}: images: expected 1 or 3 channels, got {sizes[1]} of {sizes}")
    if min(sizes[2:]) < 1 or max(sizes[2:]) > LARGEST_SIDE or math.prod(sizes[1:]) >= 2**31:
        raise ValueError(
            f"{OP}: images: expected images of at least one pixel, at most {LARGEST_SIDE} a side "
            f"and less than 2^31 values, got sizes {sizes}"
        )
    if memory_format_of(images) is None:
        raise ValueError(
            f"{OP}: images: expected a dense NCHW or channels_last tensor, got sizes {sizes} with "
            f"strides {list(images.stride())}; call images.contiguous() or "
            f"images.contiguous(memory_format=torch.channels_last) first"
        )
    check_device(OP, "images", images)


def check_mask_fill(op: str, fill: int, dtype: torch.dtype = torch.int64) -> None:
    """Check a mask's fill; int64 holds those of uint8 too, and -1 or -100, which losses ignore."""
    if not isinstance(fill, int):
        raise TypeError(f"{op}: mask_fill: expected an int, got {type(fill).__name__}")
    limits = torch.iinfo(dtype)
    if not limits.min <= fill <= limits.max:
        raise ValueError(f"{op}: mask_fill: expected a number that {dtype} holds, got {fill}")


def check_masks(masks: Tensor, images: Tensor, fill: int) -> None:
    """Check masks [n, h, w] or [n, 1, h, w] of the images' sizes, and the fill for their dtype."""
    if not isinstance(masks, Tensor):
        raise TypeError(f"{OP}: masks: expected a Tensor, got {type(masks).__name__}")
    if masks.dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"{OP}: masks: expected uint8 or int64, got {masks.dtype}")
    n, _, h, w = images.shape
    if masks.shape not in ((n, h, w), (n, 1, h, w)):
        raise ValueError(
            f"{OP}: masks: expected sizes {[n, h, w]} or {[n, 1, h, w]}, got {list(masks.shape)}"
        )
    if masks.device != images.device:
        raise ValueError(f"{OP}: masks: expected device {images.device}, got {masks.device}")
    if not masks.is_contiguous():
        raise ValueError(
            f"{OP}: masks: expected a dense tensor, got strides {list(masks.stride())}; call "
            f"masks.contiguous() first"
        )
    check_mask_fill(OP, fill, masks.dtype)


def augment(
    images: Tensor,
    parameters: AugmentParameters,
    masks: Tensor | None,
    size: Sequence[int] | None,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    fill: float | Sequence[float],
    mask_fill: int,
    erase_value: float | Sequence[float],
) -> Any:
    """Check, pack and run: see fastcnn.functional.augment."""
    check_images(images)
    if not isinstance(parameters, AugmentParameters):
        raise TypeError(
            f"{OP}: parameters: expected AugmentParameters, got {type(parameters).__name__}"
        )
    n, c, h, w = images.shape
    given = parameters.angle.shape[0]  # len() would make a constant of torch.export's batch size
    if given != n:
        raise ValueError(f"{OP}: parameters: expected those of {n} samples, got {given}")
    check_mask_fill(OP, mask_fill)
    if masks is not None:
        check_masks(masks, images, mask_fill)
    if dtype not in DTYPES:
        raise TypeError(f"{OP}: dtype: expected float32, bfloat16 or float16, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"{OP}: memory_format: expected torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )
    out = (h, w) if size is None else check_size(OP, "size", size)
    means, stds = per_channel("mean", mean, c), per_channel("std", std, c)
    if 0.0 in stds:
        raise ValueError(f"{OP}: std: expected numbers other than 0, got {std!r}")
    fills, erased = per_channel("fill", fill, c), per_channel("erase_value", erase_value, c)
    if not all(0 <= level <= TOP_LEVEL for level in fills):
        raise ValueError(f"{OP}: fill: expected grey levels from 0 to 255, got {fill!r}")
    channels = torch.tensor(
        [
            [1 / (TOP_LEVEL * s), -m / s, f, e]
            for m, s, f, e in zip(means, stds, fills, erased, strict=True)
        ],
        dtype=torch.float32,
        device="cpu",
    )
    rows = *pack(parameters, (h, w), out), channels
    # Not waiting for the GPU: CUDA has taken the values of pageable memory when the call returns.
    reals, integers, channels = (t.to(images.device, non_blocking=True) for t in rows)
    channels_last = memory_format is torch.channels_last
    y = _augment(images, reals, integers, channels, *out, DTYPES[dtype], channels_last)
    if masks is None:
        return y
    followed = _augment_mask(masks.view(n, h, w), reals, *out, mask_fill)
    return y, (followed if masks.dim() == 3 else followed[:, None])
