"""fastcnn.augment.Collate: how batches reach Augment, from a DataLoader's workers too."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from support.augment_cases import EVERYTHING, SIZE, smooth_images
from support.seeds import seeded
from torch.utils.data import DataLoader

from fastcnn.augment import Augment, Collate


class Pictures(torch.utils.data.Dataset[Any]):
    """24 pictures of two sizes in two layouts, with labels or masks, and their indices as keys."""

    def __init__(self, masks: bool, keys: bool, sizes: int) -> None:
        self.masks, self.keys, self.sizes = masks, keys, sizes

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        h, w = ((40, 50), (30, 44))[i % self.sizes]
        image = smooth_images(1, 3, h, w + 0)[0].roll(i, 1)
        target = torch.full((h, w), i % 7) if self.masks else i
        return (image, target, i) if self.keys else (image, target)


def epoch(dataset: Pictures, workers: int, seed: int | None = 5, **kwargs: Any) -> dict[Any, Any]:
    collate = pickle.loads(pickle.dumps(Collate(Augment((20, 30), **EVERYTHING), seed)))
    loader = DataLoader(
        dataset, batch_size=5, num_workers=workers, collate_fn=collate, generator=seeded(1),
        multiprocessing_context="fork" if workers else None, **kwargs,
    )  # fmt: skip
    found = {}
    for images, targets in loader:
        for image, target in zip(images, targets, strict=True):
            key = len(found) if targets.dim() > 1 else int(target)
            found[key] = (image.clone(), target.clone())
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("sizes", [1, 2])
def test_workers_and_order_change_nothing_with_keys(sizes: int) -> None:
    dataset = Pictures(masks=False, keys=True, sizes=sizes)
    expected = epoch(dataset, 0)
    for found in (epoch(dataset, 2), epoch(dataset, 0, shuffle=True), epoch(dataset, 2)):
        assert sorted(found) == list(range(24))
        assert all(torch.equal(found[i][0], expected[i][0]) for i in range(24))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_without_keys_repeat_with_the_loader_s_seed() -> None:
    dataset = Pictures(masks=True, keys=False, sizes=1)
    first, second = epoch(dataset, 2, None), epoch(dataset, 2, None)
    for i in range(24):
        assert torch.equal(first[i][0], second[i][0])
        assert torch.equal(first[i][1], second[i][1])
        assert first[i][1].dtype is torch.int64
        assert set(first[i][1].unique().tolist()) <= {i % 7, 255}
    assert not torch.equal(first[0][0], first[5][0].roll(-5, 1))


def test_collate_names_what_it_does_not_take() -> None:
    collate = Collate(Augment())
    with pytest.raises(TypeError, match=r"Collate: expected samples \(image, target\) or .* got"):
        collate([torch.zeros(3, 4, 4)])
    with pytest.raises(TypeError, match="Collate: image: expected a Tensor, got str"):
        collate([("x", 1)])
    with pytest.raises(ValueError, match="Collate: samples: expected at least one, got none"):
        collate([])
    small, large = torch.zeros(3, 4, 4).byte(), torch.zeros(3, 5, 4).byte()
    with pytest.raises(
        ValueError, match=r"Collate: key: .* in none, got 1 with a key of 2 samples"
    ):
        collate([(small, 1, 7), (small, 1)])
    with pytest.raises(ValueError, match=r"Collate: image: .* got \[3, 4, 4\] and \[3, 5, 4\]; bu"):
        collate([(large, 1), (small, 1)])


def test_collate_takes_no_seed_without_keys() -> None:
    # Keys by position in the batch would repeat the first batch's augmentation in all the others.
    samples = [(smooth_images(1, 3, *SIZE)[0], i) for i in range(3)]
    with pytest.raises(ValueError, match=r"Collate: seed, key: .* got seed=5 .*; give each its"):
        Collate(Augment(**EVERYTHING, size=(20, 30)), seed=5)(samples)
    collate = Collate(Augment(**EVERYTHING, size=(20, 30)))
    assert not torch.equal(collate(samples)[0], collate(samples)[0])


IMAGE, MASK = torch.zeros(3, 4, 4).byte(), torch.zeros(4, 4).byte()
# Samples, and what is wrong with them.
BAD_SAMPLES: list[tuple[list[Any], type[Exception], str]] = [
    ([(IMAGE, "a")], TypeError, r"target: expected a mask, a Tensor, or a number .* got 'a'"),
    ([(IMAGE, 1), (IMAGE, None)], TypeError, r"target: expected a mask, .* got None"),
    ([(IMAGE, {"a": 1})], TypeError, r"target: expected a mask, .* got {'a': 1}"),
    ([(IMAGE, 2**70)], TypeError, r"target: expected .* int64 .* got 1180591620717411303424"),
    (
        [(IMAGE, torch.ones(2)), (IMAGE, torch.ones(3))],
        ValueError,
        r"target: expected labels of one size, got \[2\] and \[3\]",
    ),
    (
        [(IMAGE, 1), (IMAGE, torch.ones(2))],
        TypeError,
        r"target: expected Tensors in all samples or in none, got 1 of 2",
    ),
    ([(IMAGE, 1), (IMAGE, MASK)], TypeError, r"target: .* masks in all samples .* got 1 of 2"),
    ([(IMAGE, MASK), (IMAGE, torch.tensor(1))], TypeError, r"target: .* masks in all .* got 1 of"),
    (
        [(IMAGE, MASK), (IMAGE, MASK[None])],
        ValueError,
        r"target: expected masks of one rank, got \[4, 4\] and \[1, 4, 4\]",
    ),
    ([(IMAGE, MASK), (IMAGE, MASK[:3])], ValueError, r"target: .* \[4, 4\] .* got \[3, 4\]"),
    ([(IMAGE, 1, "a")], TypeError, r"key: expected an int .*, got 'a'"),
    ([(IMAGE, 1, 0.5)], TypeError, r"key: expected an int .*, got 0.5"),
    ([(IMAGE, 1, 2**70)], ValueError, r"key: expected an int from -2\^63 to 2\^63 - 1, got 11805"),
    ([(IMAGE, 1), (IMAGE[:1], 1)], ValueError, r"image: expected .* channels, got 1 and 3"),
    ([(IMAGE[0], 1)], ValueError, r"image: expected 3 dimensions \[c, h, w\], got 2: \[4, 4\]"),
]


@pytest.mark.parametrize(("samples", "error", "message"), BAD_SAMPLES)
def test_samples(samples: list[Any], error: type[Exception], message: str) -> None:
    for size in (None, (3, 3)):  # images of several sizes take another way
        with pytest.raises(error, match=f"^Collate: {message}"):
            Collate(Augment(size))(samples)


@pytest.mark.parametrize(
    ("seed", "error"),
    [("x", TypeError), (1.5, TypeError), (2**64, ValueError), (-(2**63) - 1, ValueError)],
)
def test_seeds(seed: Any, error: type[Exception]) -> None:
    # Beyond what torch.Generator takes; refused when made, and when changed between epochs.
    with pytest.raises(error, match=rf"^Collate: seed: expected an int .*, got {seed!r}"):
        Collate(Augment(), seed)
    collate = Collate(Augment(), 1)
    with pytest.raises(error, match=rf"^Collate: seed: expected an int .*, got {seed!r}"):
        collate.seed = seed


def test_numbers_of_numpy_and_tensors_are_keys_seeds_and_labels() -> None:
    # Indices and labels often come out of arrays.
    image, module = smooth_images(1, 3, *SIZE)[0], Augment((20, 30), **EVERYTHING)
    expected = Collate(module, 2**64 - 1)([(image, 3, 7)])
    for key, label in ((np.int64(7), np.int64(3)), (torch.tensor(7), torch.tensor(3))):
        found = Collate(module, np.uint64(2**64 - 1))([(image, label, key)])
        assert all(map(torch.equal, found, expected))
