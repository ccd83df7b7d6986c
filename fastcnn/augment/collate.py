"""Collate: the samples of a DataLoader as one augmented batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.augment.module import Augment


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
        seed: of samples with keys; None draws one for each batch.

    Returns:
        (images, targets), as ``augment`` gives them.

    Raises:
        TypeError: a sample that is neither of the two, an image that is no Tensor.
        ValueError: no samples; some with keys and some without; a seed beside samples without keys;
            images that differ in size where augment.size is None.
    """

    def __init__(self, augment: Augment, seed: int | None = None) -> None:
        self.augment = augment
        self.seed = seed

    def __call__(self, samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return the batch."""
        self._check(samples)
        images, targets = [sample[0] for sample in samples], [sample[1] for sample in samples]
        keys = torch.tensor([s[2] if len(s) == 3 else i for i, s in enumerate(samples)])
        seed = int(torch.randint(2**63 - 1, ())) if self.seed is None else self.seed
        masked = all(isinstance(t, Tensor) and t.dim() >= 2 for t in targets)

        def run(chosen: slice) -> Any:
            generator = torch.Generator().manual_seed(seed)
            masks = torch.stack(targets[chosen]) if masked else None
            batch = torch.stack(images[chosen])
            return self.augment(batch, masks, generator=generator, keys=keys[chosen])

        if len({image.shape for image in images}) == 1:
            done = run(slice(None))
        else:
            parts = [run(slice(i, i + 1)) for i in range(len(images))]
            done = tuple(map(torch.cat, zip(*parts, strict=True))) if masked else torch.cat(parts)
        if masked:
            return done
        stacked = torch.stack(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)
        return done, stacked

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
        if len(sizes) > 1 and self.augment.size is None:
            raise ValueError(
                f"Collate: image: expected images of one size where augment.size is None, got "
                f"{list(sizes[0])} and {list(sizes[1])}; build the Augment with a size"
            )
