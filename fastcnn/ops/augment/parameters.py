"""AugmentParameters: what happens to each sample of a batch, as tensors that can be looked at."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

# By field: its dtype, its numbers a sample (0: one, without a dimension of its own), what each must
# be, and the test for that.
_Check = tuple[torch.dtype, int, str, Callable[[Tensor], Tensor] | None]
_FINITE = "finite numbers"
_FACTOR = "finite numbers of at least 0"


def _at_least_zero(t: Tensor) -> Tensor:
    return t.isfinite() & (t >= 0)


_CHECKS: dict[str, _Check] = {
    "angle": (torch.float32, 0, _FINITE, torch.isfinite),
    "translate": (torch.float32, 2, _FINITE, torch.isfinite),
    "scale": (torch.float32, 0, "finite numbers above 0", lambda t: t.isfinite() & (t > 0)),
    "shear": (torch.float32, 2, "angles between -90 and 90", lambda t: t.abs() < 90),
    "crop": (
        torch.int64,
        4,
        "top, left and a height and width of at least 1",
        lambda t: t[:, 2:] > 0,
    ),
    "horizontal_flip": (torch.bool, 0, "True or False", None),
    "vertical_flip": (torch.bool, 0, "True or False", None),
    "brightness": (torch.float32, 0, _FACTOR, _at_least_zero),
    "contrast": (torch.float32, 0, _FACTOR, _at_least_zero),
    "saturation": (torch.float32, 0, _FACTOR, _at_least_zero),
    "hue": (torch.float32, 0, "numbers from -0.5 to 0.5", lambda t: t.abs() <= 0.5),
    "noise": (torch.float32, 0, _FACTOR, _at_least_zero),
    "noise_seed": (torch.int64, 0, "any number", None),
    "erase": (torch.int64, 4, "numbers of at least 0", lambda t: t >= 0),
}


@dataclass(frozen=True, eq=False)
class AugmentParameters:
    """What :func:`fastcnn.functional.augment` does to each of n samples, in the fields' order.

    Tensors of one device; ``parameters[i]`` and ``parameters[tensor or slice]`` pick samples, where
    i is a number of any kind, a tensor without dimensions included;
    ``dataclasses.asdict`` and the constructor save and restore them.

    Attributes:
        angle: [n] float32, degrees, clockwise as in torchvision's affine (its rotate turns the
            other way).
        translate: [n, 2] float32, pixels of the image, to the right and down.
        scale: [n] float32, above 0.
        shear: [n, 2] float32, degrees, along x and y.
        crop: [n, 4] int64, top, left, height and width in pixels of the image, as torchvision's
            crop; it is resized to the output's size where it has another.
        horizontal_flip: [n] bool.
        vertical_flip: [n] bool.
        brightness: [n] float32, factor, 1 for none; likewise contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: [n] float32, turns from -0.5 to 0.5.
        noise: [n] float32, standard deviation of Gaussian noise, 1 for the whole range of levels.
        noise_seed: [n] int64, the noise's own: equal seeds give equal noise.
        erase: [n, 4] int64, top, left, height and width of a rectangle of the output; empty with a
            height or width of 0.
        check_values: False where the values are known to be in their ranges; sizes and types are
            checked all the same. On other devices than the CPU values are never looked at.

    Raises:
        TypeError: a field that is no Tensor, or of another dtype.
        ValueError: a field of another size or device, with values outside of its range, or that
            requires a gradient.

    Example:
        >>> parameters = fastcnn.functional.AugmentParameters.identity(4, (32, 32))
        >>> _ = parameters.angle.fill_(15.0)
        >>> parameters[:2].angle
        tensor([15., 15.])
    """

    angle: Tensor
    translate: Tensor
    scale: Tensor
    shear: Tensor
    crop: Tensor
    horizontal_flip: Tensor
    vertical_flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    noise: Tensor
    noise_seed: Tensor
    erase: Tensor
    check_values: InitVar[bool] = True

    def __post_init__(self, check_values: bool) -> None:
        first = self.angle
        for name, (dtype, width, expected, test) in _CHECKS.items():
            t = getattr(self, name)
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"AugmentParameters: {name}: expected a Tensor, got {type(t).__name__}"
                )
            if t.dtype is not dtype:
                raise TypeError(f"AugmentParameters: {name}: expected {dtype}, got {t.dtype}")
            n = first.shape[0] if first.dim() > 0 else 0
            sizes = (n, width) if width else (n,)
            if t.shape != sizes:
                raise ValueError(
                    f"AugmentParameters: {name}: expected sizes {list(sizes)}, got {list(t.shape)}"
                )
            if t.device != first.device:
                raise ValueError(
                    f"AugmentParameters: {name}: expected device {first.device}, got {t.device}"
                )
            if t.requires_grad:
                raise ValueError(
                    f"AugmentParameters: {name}: expected a Tensor without gradient, since augment "
                    f"is not differentiable, got one that requires it; call .detach() first"
                )
            # Elsewhere than on the CPU the question would stop the device's queue.
            on_cpu = check_values and t.device.type == "cpu"
            if test is not None and on_cpu and not bool(test(t).all()):
                raise ValueError(f"AugmentParameters: {name}: expected {expected}, got {t}")

    @classmethod
    def identity(cls, n: int, size: tuple[int, int]) -> "AugmentParameters":
        """Return parameters, on the CPU, that leave n images of this size as they are."""
        ones = torch.ones(n, device="cpu")
        zeros, off = torch.zeros_like(ones), torch.zeros_like(ones, dtype=torch.bool)
        crop = torch.tensor([0, 0, *size], device="cpu").repeat(n, 1)
        return cls(
            angle=zeros, translate=ones.new_zeros(n, 2), scale=ones, shear=ones.new_zeros(n, 2),
            crop=crop, horizontal_flip=off, vertical_flip=off, brightness=ones, contrast=ones,
            saturation=ones, hue=zeros, noise=zeros,
            noise_seed=torch.zeros_like(ones, dtype=torch.int64), erase=torch.zeros_like(crop),
            check_values=False,
        )  # fmt: skip

    def __len__(self) -> int:
        return self.angle.shape[0]

    def __getitem__(
        self, index: SupportsIndex | slice | Tensor | Sequence[int]
    ) -> "AugmentParameters":
        """Return the parameters of some samples, of one for a number."""
        chosen: Any = index
        if not isinstance(index, (slice, list)) and getattr(index, "ndim", 0) != 1:
            try:
                number = range(len(self))[operator.index(chosen)]
            except TypeError:
                raise TypeError(
                    f"AugmentParameters: index: expected an int, a slice, or numbers or flags in a "
                    f"Tensor of one dimension, got {index!r}"
                ) from None
            chosen = slice(number, number + 1)
        return self._map(lambda t: t[chosen])

    def to(self, device: torch.device | str) -> "AugmentParameters":
        """Return the parameters on a device; those that come to the CPU are checked there."""
        comes = self.angle.device.type != "cpu"
        return self._map(lambda t: t.to(device, non_blocking=not comes), check_values=comes)

    def _map(
        self, change: Callable[[Tensor], Tensor], check_values: bool = False
    ) -> "AugmentParameters":
        fields = dataclasses.fields(self)
        changed = {f.name: change(getattr(self, f.name)) for f in fields}
        return AugmentParameters(**changed, check_values=check_values)
