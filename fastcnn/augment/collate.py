"""Collate: the samples of a DataLoader as one augmented batch."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.augment.module import Augment


def _integer(name: str, value: Any, bits: int) -> int:
    """An integer of any kind, as NumPy's, from -2^63 and of so many bits."""
    expected = f"Collate: {name}: expected an int from -2^63 to 2^{bits} - 1, got {value!r}"
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(expected) from None
    if not -(2**63) <= number < 2**bits:
        raise ValueError(expected)
    return number


def _is_mask(target: Any) -> bool:
    return isinstance(target, Tensor) and target.dim() >= 2


def _is_label(target: Any) -> bool:
    try:
        torch.tensor(target, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _labels(targets: list[Any]) -> Tensor:
    """Stack numbers or Tensors."""
    tensors = [t for t in targets if isinstance(t, Tensor)]
    if not tensors:
        try:
            return torch.tensor(targets, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            bad = next((t for t in targets if not _is_label(t)), targets[0])
            raise TypeError(
                f"Collate: target: expected a mask, a Tensor, or a number that int64 or float32 "
                f"holds, got {bad!r}"
            ) from error
    if len(tensors) < len(targets):
        raise TypeError(
            f"Collate: target: expected Tensors in all samples or in none, got {len(tensors)} of "
            f"{len(targets)}"
        )
    sizes = sorted({tuple(t.shape) for t in tensors})
    if len(sizes) > 1:
        raise ValueError(
            f"Collate: target: expected labels of one size, got {list(sizes[0])} and "
            f"{list(sizes[1])}"
        )
    return torch.stack(tensors)


def _check_masks(samples: Sequence[Any]) -> None:
    masks = [(image, target) for image, target, *_ in samples if _is_mask(target)]
    if 0 < len(masks) < len(samples):
        raise TypeError(
            f"Collate: target: expected masks in all samples or in none, got {len(masks)} of "
            f"{len(samples)}"
        )
    for image, mask in masks:
        h, w = image.shape[1:]
        if mask.shape not in ((h, w), (1, h, w)):
            raise ValueError(
                f"Collate: target: expected a mask of its image's sizes {[h, w]} or "
                f"{[1, h, w]}, got {list(mask.shape)}"
            )
        if mask.dim() != masks[0][1].dim():
            raise ValueError(
                f"Collate: target: expected masks of one rank, got {list(masks[0][1].shape)} "
                f"and {list(mask.shape)}"
            )


class Collate:
    """Stack samples and augment them, in the DataLoader's workers where it has some.

    A sample is (image, target) or (image, target, key): image [c, h, w], uint8, which may differ in
    size from the others where augment.size is given; target a mask ([h, w] or [1, h, w], uint8 or
    int64, which follows the image's geometry) or a label (a number or a tensor, stacked); key an
    int that is the sample's own, as its index in the data set.

    With a seed, which takes keys, a sample's augmentation depends on (seed, key) alone: not on the
    batch, the order or the number of workers. Without, batches draw from torch's generator, which a
    DataLoader seeds in each worker: reproducible with the same seed and number of workers. seed may
    be changed between epochs; workers that persist do not see that.

    Args:
        augment: in training or evaluation mode, with parameters and outputs on the CPU.
        seed: of samples with keys, any that torch.Generator takes; None draws one for each batch.

    Returns:
        (images, targets), as ``augment`` gives them.

    Raises:
        TypeError: a sample that is neither of the two; an image that is no Tensor; a target of
            another type, or of another kind than the others; a key or seed that is no int.
        ValueError: no samples; some with keys and some without; a seed beside samples without keys;
            images that differ in channels, or where augment.size is None in size; masks of another
            size than their image or another rank than the others, labels that differ in size; a key
            or seed of more than 64 bits.

    Example:
        >>> collate = fastcnn.augment.Collate(fastcnn.augment.Augment((24, 24)), seed=0)
        >>> image = torch.zeros(3, 32, 32, dtype=torch.uint8)
        >>> images, labels = collate([(image, 7, 0), (image, 1, 1)])  # image, label, index
        >>> images.shape, labels
        (torch.Size([2, 3, 24, 24]), tensor([7, 1]))
    """

    def __init__(self, augment: Augment, seed: int | None = None) -> None:
        self.augment = augment
        self.seed = seed

    @property
    def seed(self) -> int | None:
        """The seed of samples with keys."""
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = None if seed is None else _integer("seed", seed, 64)

    def __call__(self, samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return the batch."""
        self._check(samples)
        images, targets = [sample[0] for sample in samples], [sample[1] for sample in samples]
        keys = torch.tensor(
            [_integer("key", s[2], 63) if len(s) == 3 else i for i, s in enumerate(samples)],
            device="cpu",
        )
        labels = None if _is_mask(targets[0]) else _labels(targets)
        seed = self.seed
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))

        def run(chosen: slice) -> Any:
            generator = torch.Generator().manual_seed(seed)
            masks = torch.stack(targets[chosen]) if labels is None else None
            batch = torch.stack(images[chosen])
            return self.augment(batch, masks, generator=generator, keys=keys[chosen])

        if len({image.shape for image in images}) == 1:
            done = run(slice(None))
        else:
            parts = [run(slice(i, i + 1)) for i in range(len(images))]
            pairs = labels is None
            done = tuple(map(torch.cat, zip(*parts, strict=True))) if pairs else torch.cat(parts)
        return done if labels is None else (done, labels)

    def _check(self, samples: Sequence[Any]) -> None:
        if len(samples) == 0:
            raise ValueError("Collate: samples: expected at least one, got none")
        for sample in samples:
            if not isinstance(sample, (tuple, list)) or len(sample) not in (2, 3):
                raise TypeError(
                    f"Collate: expected samples (image, target) or (image, target, key), "
                    f"got {type(sample).__name__}"
                )
            if not isinstance(sample[0], Tensor):
                raise TypeError(
                    f"Collate: image: expected a Tensor, got {type(sample[0]).__name__}"
                )
            if sample[0].dim() != 3:
                raise ValueError(
                    f"Collate: image: expected 3 dimensions [c, h, w], got {sample[0].dim()}: "
                    f"{list(sample[0].shape)}"
                )
        keyed = [len(sample) == 3 for sample in samples]
        if any(keyed) and not all(keyed):
            raise ValueError(
                f"Collate: key: expected one in all samples or in none, got {sum(keyed)} with a "
                f"key of {len(samples)} samples"
            )
        if self.seed is not None and not all(keyed):
            # Positions in the batch as keys would repeat the same augmentation in every batch.
            raise ValueError(
                f"Collate: seed, key: expected samples (image, target, key) beside a seed, got "
                f"seed={self.seed} and samples without keys; give each its index in the data set "
                f"as a key, or pass seed=None and seed the DataLoader's generator"
            )
        sizes = sorted({tuple(sample[0].shape) for sample in samples})
        if sizes[0][0] != sizes[-1][0]:
            raise ValueError(
                f"Collate: image: expected images of one number of channels, got {sizes[0][0]} and "
                f"{sizes[-1][0]}"
            )
        if len(sizes) > 1 and self.augment.size is None:
            raise ValueError(
                f"Collate: image: expected images of one size where augment.size is None, got "
                f"{list(sizes[0])} and {list(sizes[1])}; build the Augment with a size"
            )
        _check_masks(samples)
