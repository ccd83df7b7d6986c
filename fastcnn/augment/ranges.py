"""What may happen to a sample: the ranges that parameters are drawn from, as torchvision's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[float, float]
_OP = "Augment"
# Parameters are float32: what is above 0, finite or below 90 must be so there.
_ABOVE_0 = 2.0**-149
_LARGEST = (2 - 2.0**-23) * 2.0**127
_BELOW_90 = 90 - 2.0**-17


def _numbers(name: str, value: object, *counts: int) -> tuple[float, ...]:
    if not isinstance(value, Sequence) or not all(isinstance(v, (int, float)) for v in value):
        raise TypeError(f"{_OP}: {name}: expected a sequence of numbers, got {value!r}")
    if len(value) not in counts:
        expected = " or ".join(map(str, counts))
        raise ValueError(f"{_OP}: {name}: expected {expected} numbers, got {value!r}")
    return tuple(float(v) for v in value)


def _bounds(low: float, high: float) -> str:
    """Say which numbers are allowed, open ends by the round number that they leave out."""
    lower = {-math.inf: "", _ABOVE_0: "above 0", -_BELOW_90: "above -90"}
    upper = {math.inf: "", _BELOW_90: "below 90"}
    ends = lower.get(low, f"of at least {low:g}"), upper.get(high, f"at most {high:g}")
    return " and ".join(filter(None, ends)) or "of any size"


def _finite(name: str, value: float, high: float = math.inf) -> None:
    if not 0 <= value <= min(high, _LARGEST):
        raise ValueError(
            f"{_OP}: {name}: expected a finite float32 number {_bounds(0.0, high)}, got {value}"
        )


def _ordered(name: str, value: Range, low: float, high: float) -> Range:
    if not max(low, -_LARGEST) <= value[0] <= value[1] <= min(high, _LARGEST):
        raise ValueError(
            f"{_OP}: {name}: expected a range of finite float32 numbers "
            f"{_bounds(low, high)}, the lower end first, got {value}"
        )
    return value


def _pair(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> Range:
    a, b = _numbers(name, value, 2)
    return _ordered(name, (a, b), low, high)


def symmetric(name: str, value: float | Sequence[float], high: float = math.inf) -> Range:
    """Return (-d, d) for a number d, or the range itself: degrees, shear."""
    if isinstance(value, (int, float)):
        _finite(name, value, high)
        return -float(value), float(value)
    return _pair(name, value, -high, high)


def shears(value: float | Sequence[float] | None) -> tuple[Range, Range]:
    """Return the ranges along x and y; a number or two numbers shear along x alone."""
    if value is None:
        return (0.0, 0.0), (0.0, 0.0)
    if isinstance(value, (int, float)):
        return symmetric("shear", value, _BELOW_90), (0.0, 0.0)
    numbers = _numbers("shear", value, 2, 4)
    along_x = _ordered("shear", (numbers[0], numbers[1]), -_BELOW_90, _BELOW_90)
    if len(numbers) == 2:
        return along_x, (0.0, 0.0)
    return along_x, _ordered("shear", (numbers[2], numbers[3]), -_BELOW_90, _BELOW_90)


def factor(name: str, value: float | Sequence[float] | None) -> Range:
    """Return (max(0, 1 - d), 1 + d) for a number d, or the range itself: brightness and kin."""
    if value is None:
        return 1.0, 1.0
    if isinstance(value, (int, float)):
        _finite(name, value)
        return max(0.0, 1.0 - value), 1.0 + value
    return _pair(name, value, 0.0)


def hues(value: float | Sequence[float] | None) -> Range:
    """Return (-d, d) for a number d, or the range itself, within half a turn."""
    return (0.0, 0.0) if value is None else symmetric("hue", value, 0.5)


def deviations(value: float | Sequence[float]) -> Range:
    """Return (d, d) for a number d, or the range itself: noise."""
    if isinstance(value, (int, float)):
        value = (value, value)
    return _pair("noise", value, 0.0)


def probability(name: str, value: float) -> float:
    """Return a number from 0 to 1."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{_OP}: {name}: expected a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{_OP}: {name}: expected a probability from 0 to 1, got {value}")
    return float(value)


@dataclass(frozen=True)
class Ranges:
    """The ranges as numbers; a range of one value draws that value."""

    degrees: Range
    translate: Range  # the largest shift as a share of width and height
    scale: Range
    shear_x: Range
    shear_y: Range
    crop_scale: Range | None  # None: RandomCrop; else RandomResizedCrop
    crop_ratio: Range
    horizontal_flip: float
    vertical_flip: float
    brightness: Range
    contrast: Range
    saturation: Range
    hue: Range
    noise: Range
    erasing: float
    erasing_scale: Range
    erasing_ratio: Range

    @classmethod
    def of(
        cls,
        degrees: float | Sequence[float],
        translate: Sequence[float] | None,
        scale: Sequence[float] | None,
        shear: float | Sequence[float] | None,
        crop_scale: Sequence[float] | None,
        crop_ratio: Sequence[float],
        horizontal_flip: float,
        vertical_flip: float,
        brightness: float | Sequence[float] | None,
        contrast: float | Sequence[float] | None,
        saturation: float | Sequence[float] | None,
        hue: float | Sequence[float] | None,
        noise: float | Sequence[float],
        erasing: float,
        erasing_scale: Sequence[float],
        erasing_ratio: Sequence[float],
    ) -> "Ranges":
        """Check what a user wrote, as torchvision's transforms take it."""
        shift = (0.0, 0.0) if translate is None else _numbers("translate", translate, 2)
        if not all(0 <= share <= 1 for share in shift):
            raise ValueError(f"{_OP}: translate: expected shares from 0 to 1, got {translate}")
        shear_x, shear_y = shears(shear)
        return cls(
            degrees=symmetric("degrees", degrees),
            translate=(shift[0], shift[1]),
            scale=(1.0, 1.0) if scale is None else _pair("scale", scale, _ABOVE_0),
            shear_x=shear_x,
            shear_y=shear_y,
            crop_scale=None
            if crop_scale is None
            else _pair("crop_scale", crop_scale, _ABOVE_0, 1.0),
            crop_ratio=_pair("crop_ratio", crop_ratio, _ABOVE_0),
            horizontal_flip=probability("horizontal_flip", horizontal_flip),
            vertical_flip=probability("vertical_flip", vertical_flip),
            brightness=factor("brightness", brightness),
            contrast=factor("contrast", contrast),
            saturation=factor("saturation", saturation),
            hue=hues(hue),
            noise=deviations(noise),
            erasing=probability("erasing", erasing),
            erasing_scale=_pair("erasing_scale", erasing_scale, 0.0, 1.0),
            erasing_ratio=_pair("erasing_ratio", erasing_ratio, _ABOVE_0),
        )
