"""Augment: random augmentation of batches, each sample with parameters of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.augment import draw as drawing
from fastcnn.augment.ranges import Ranges
from fastcnn.functional import augment
from fastcnn.ops.augment.interface import check_images, check_mask_fill, check_size
from fastcnn.ops.augment.parameters import AugmentParameters


def _check_count(n: int) -> None:
    if not isinstance(n, (int, torch.SymInt)):  # torch.export's dynamic batch
        raise TypeError(f"Augment: n: expected an int, got {type(n).__name__}")
    if n < 0:
        raise ValueError(f"Augment: n: expected at least 0, got {n}")


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"Augment: generator: expected a torch.Generator or None, got "
            f"{type(generator).__name__}"
        )
    if generator.device.type != "cpu":
        raise ValueError(
            f"Augment: generator: expected one on the CPU, got one on {generator.device}"
        )


class Augment(nn.Module):
    """Draw parameters for each sample of a batch and augment it in one pass.

    In training ``forward(images, masks=None)`` is RandomAffine, RandomCrop or RandomResizedCrop,
    the flips, ColorJitter (brightness, contrast, saturation, hue, in this order), GaussianNoise,
    Normalize and RandomErasing of torchvision.transforms.v2, with its names and ranges, applied
    with probability 1 where none is given; :func:`fastcnn.functional.augment` says how exactly.
    In evaluation images are cropped in the centre (with crop_scale: the largest centred box with
    size's aspect ratio, resized) and normalised, nothing else. Shapes, dtypes, layouts and errors
    of images and masks are those of the function. Compiles with fullgraph=True, but for a
    generator: torch.compile takes none as an argument, and breaks the graph there.

    Args:
        size: height and width of the output; None for the images' own.
        degrees: RandomAffine's: (min, max), or a number d for (-d, d).
        translate: likewise: largest shifts to the side and up or down, as shares of the image.
        scale: likewise: (min, max), drawn uniformly.
        shear: likewise: degrees, a number or 2 numbers along x, 4 numbers along x and y.
        crop_scale: RandomResizedCrop's scale, shares of the image's area; None for RandomCrop.
        crop_ratio: RandomResizedCrop's ratio.
        horizontal_flip: RandomHorizontalFlip's p.
        vertical_flip: RandomVerticalFlip's p.
        brightness: ColorJitter's: (min, max), or a number d for (1 - d, 1 + d), at least 0.
        contrast: likewise.
        saturation: likewise.
        hue: ColorJitter's: (min, max) within (-0.5, 0.5), or a number d for (-d, d).
        noise: GaussianNoise's sigma, a number or (min, max).
        erasing: RandomErasing's p.
        erasing_scale: RandomErasing's scale.
        erasing_ratio: RandomErasing's ratio.
        erase_value: see the function, as all that follow.
        fill: grey levels outside of the image.
        mask_fill: masks there: 0 to 255 beside uint8 masks, any int64 beside int64 ones.
        mean: of levels from 0 to 1.
        std: likewise.
        dtype: of the output.
        memory_format: of the output.

    Raises:
        TypeError: an argument of another type.
        ValueError: a range upside down or out of bounds, a probability outside of 0 to 1.

    Example:
        >>> augment = fastcnn.augment.Augment((24, 24), degrees=10, horizontal_flip=0.5)
        >>> augment(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 3, 24, 24])
    """

    def __init__(
        self,
        size: Sequence[int] | None = None,
        *,
        degrees: float | Sequence[float] = 0.0,
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: float | Sequence[float] | None = None,
        crop_scale: Sequence[float] | None = None,
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.0,
        vertical_flip: float = 0.0,
        brightness: float | Sequence[float] | None = None,
        contrast: float | Sequence[float] | None = None,
        saturation: float | Sequence[float] | None = None,
        hue: float | Sequence[float] | None = None,
        noise: float | Sequence[float] = 0.0,
        erasing: float = 0.0,
        erasing_scale: Sequence[float] = (0.02, 0.33),
        erasing_ratio: Sequence[float] = (0.3, 3.3),
        erase_value: float | Sequence[float] = 0.0,
        fill: float | Sequence[float] = 0.0,
        mask_fill: int = 255,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.size = None if size is None else check_size("Augment", "size", size)
        self.ranges = Ranges.of(
            degrees, translate, scale, shear, crop_scale, crop_ratio, horizontal_flip,
            vertical_flip, brightness, contrast, saturation, hue, noise, erasing, erasing_scale,
            erasing_ratio,
        )  # fmt: skip
        check_mask_fill("Augment", mask_fill)
        self.output: dict[str, Any] = {
            "erase_value": erase_value, "fill": fill, "mask_fill": mask_fill, "mean": mean,
            "std": std, "dtype": dtype, "memory_format": memory_format,
        }  # fmt: skip

    def draw(
        self,
        n: int,
        size: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        keys: Tensor | None = None,
    ) -> AugmentParameters:
        """Return parameters for n images of this height and width.

        One seed is taken from the generator (None: torch's own); sample i's parameters depend on it
        and on keys[i] alone, not on the others, their order or the process.

        Args:
            n: number of samples.
            size: height and width of the images.
            generator: on the CPU.
            keys: int64 [n], the samples' own numbers, as their indices in the data set; None for
                0 to n - 1.

        Raises:
            TypeError: n, generator or keys of another type.
            ValueError: n below 0; a generator of another device; keys of another number; images
                smaller than the crop.
        """
        _check_count(n)
        _check_generator(generator)
        size_in, size_out = self._sizes(size)
        if keys is None:
            keys = torch.arange(n, device="cpu")
        elif not isinstance(keys, Tensor) or keys.dtype is not torch.int64:
            raise TypeError(f"Augment: keys: expected an int64 Tensor, got {keys!r}")
        elif keys.shape != (n,):
            raise ValueError(f"Augment: keys: expected sizes [{n}], got {list(keys.shape)}")
        seed = torch.randint(2**63 - 1, (), generator=generator, device="cpu")
        return drawing.draw(self.ranges, seed, keys.cpu(), size_in, size_out)

    def center(self, n: int, size: Sequence[int]) -> AugmentParameters:
        """Return the parameters of evaluation for n images of this height and width."""
        _check_count(n)
        size_in, size_out = self._sizes(size)
        parameters = AugmentParameters.identity(n, size_in)
        crop = drawing.center_crop(self.ranges, size_in, size_out)
        parameters.crop.copy_(parameters.crop.new_tensor(crop))
        return parameters

    def apply_parameters(
        self, images: Tensor, parameters: AugmentParameters, masks: Tensor | None = None
    ) -> Any:
        """Augment with given parameters: replays what was drawn before, bit for bit."""
        return augment(images, parameters, masks=masks, size=self.size, **self.output)

    def forward(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        keys: Tensor | None = None,
    ) -> Any:
        """Return the augmented images, with masks a pair."""
        check_images(images)
        n, size = images.shape[0], images.shape[2:]
        p = self.draw(n, size, generator, keys=keys) if self.training else self.center(n, size)
        return self.apply_parameters(images, p, masks)

    def _sizes(self, size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        size_in = check_size("Augment", "size", size)
        size_out = size_in if self.size is None else self.size
        smaller = size_in[0] < size_out[0] or size_in[1] < size_out[1]
        if smaller and self.ranges.crop_scale is None:
            raise ValueError(
                f"Augment: images: expected at least {list(size_out)}, the size of the crop, got "
                f"{list(size_in)}; with crop_scale=(0.08, 1.0) crops are resized"
            )
        return size_in, size_out

    def extra_repr(self) -> str:
        """Return the ranges."""
        return f"size={self.size}, {self.ranges}"
